"""What people give as a model and is none: one sentence that says what it is, by content."""

import io
import json
import tarfile
import zipfile

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from functional_sd3 import weights
from functional_sd3.weights import WeightsError
from tests.models import random_model

X = torch.zeros(2)


def image(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, kind)
    return buffer.getvalue()


def tar(mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"), io.BytesIO())
    return buffer.getvalue()


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/model.safetensors", b"0" * 1000)
    return buffer.getvalue()


CONTENTS = {
    **{f"{kind} image": (lambda kind=kind: image(kind), "is an image, not weights") for kind in ("PNG", "JPEG", "GIF")},
    "WebP image": (lambda: image("WEBP"), "is an image, not weights"),
    "zip": (zipped, "is a zip archive, not weights: unpack it"),
    "tar": (lambda: tar("w"), "is an archive, not weights: unpack it"),
    "tar.gz": (lambda: tar("w:gz"), "is an archive, not weights: unpack it"),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c" + bytes(64), "is an archive, not weights: unpack it"),
    "ONNX": (lambda: b"\x08\x08\x12\x07pytorch" + bytes(64), "is an ONNX model"),
    "TensorRT": (lambda: b"ftrt" + bytes(64), "is a TensorRT engine"),
    "text": (lambda: b"These are not the weights you are looking for.\n" * 3, "is a text file, not weights"),
}
NAMES = {
    "transformer_blocks.0.attn.to_q.weight.quant_state.bitsandbytes__nf4": "quantized by bitsandbytes",
    "transformer_blocks.0.attn.to_q.SCB": "quantized by bitsandbytes",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "a Flux model",
    "single_transformer_blocks.0.attn.to_q.weight": "a Flux model",
    "conditioner.embedders.0.transformer.x": "a checkpoint of Stable Diffusion XL",
    "cond_stage_model.transformer.x": "a checkpoint of Stable Diffusion 1 or 2",
    "down_blocks.0.resnets.0.time_emb_proj.weight": "a U-Net",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": r"a LoRA, which lora.load reads \(--lora\)",
    "controlnet_blocks.0.weight": r"a ControlNet, which weights.load_controlnet reads \(--controlnet\)",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_of_another_kind_is_named(name, tmp_path):
    make, said = CONTENTS[name]
    (tmp_path / "x").write_bytes(make())
    with pytest.raises(WeightsError, match=said):
        weights.load(tmp_path / "x")


@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_another_model_are_named(name, tmp_path):
    save_file({name: X, "transformer_blocks.0.norm1.linear.weight": X.clone()}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=f"is {NAMES[name]}"):
        weights.load(tmp_path / "x.safetensors")


def test_a_gguf_file_in_a_folder_of_downloads_is_found(tmp_path):
    import gguf

    from functional_sd3.core import tree
    from functional_sd3.layouts import registry, rules

    model = random_model()
    weights.save(tmp_path, model._replace(params={"vae": model.params["vae"]}), layout="stability")
    format, config = registry.BARE["transformer"], model.config.transformer
    leaves = tree.flatten_paths(model.params["transformer"])
    writer = gguf.GGUFWriter(tmp_path / "sd3.5.gguf", "sd3")
    for name, value in rules.to_theirs(format.layout(config), weights.SPECS["transformer"](config), leaves).items():
        writer.add_tensor(name, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert set(weights.load(tmp_path).params) == {"transformer", "vae"}


@pytest.mark.parametrize("claim", [{"architectures": ["CLIPModel"], "model_type": "clip"}, {"model_type": "t5"}])
def test_of_a_whole_model_of_transformers_the_tokenizer_is_taken(claim, tmp_path):
    model = random_model()
    weights.save(tmp_path / "model", model)
    folder = tmp_path / "model" / ("tokenizer_3" if claim["model_type"] == "t5" else "tokenizer")
    (folder / "config.json").write_text(json.dumps(claim))
    if claim["model_type"] == "clip":
        (folder / "model.safetensors").write_bytes(b"not looked at")
    found = weights.load(folder)
    assert found.params == {} and any(tables is not None for tables in found.tokenizers)
