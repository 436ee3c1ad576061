"""Weights from one form to another on the command line, and what inspect says of each form."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from functional_sd3 import cli, weights
from functional_sd3.core import prng, tree
from functional_sd3.text import bpe, textual_inversion, unigram
from functional_sd3.transformer import controlnet, ip_adapter
from functional_sd3.weights import Tokenizers


def run(*words) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture
def file(folder, tmp_path):
    assert run("convert", folder, tmp_path / "x.safetensors", "--layout", "single") == 0
    return tmp_path / "x.safetensors"


def test_a_folder_becomes_a_file_and_with_its_tokenizers_a_folder_again(folder, file, tmp_path, capsys):
    assert run("convert", folder, tmp_path / "y.safetensors", "--layout", "native") == 0
    assert "tokenizers are not in the file" in capsys.readouterr().out
    tokenizers = [folder / name for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
    assert run("convert", file, *tokenizers, tmp_path / "again", "--layout", "diffusers", "--shard-size", "50kB") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'again'}: clip_l, clip_g, t5, transformer, vae\n"
    first, again = weights.load(folder), weights.load(tmp_path / "again")
    assert again.config == first.config
    assert tree.diff(again.params, first.params) == []
    assert list((tmp_path / "again" / "transformer").glob("*.index.json"))
    for name, module in zip(Tokenizers._fields, (bpe, bpe, unigram), strict=True):
        ids = [module.apply(getattr(model.tokenizers, name), ["a red circle"], length=12) for model in (first, again)]
        assert torch.equal(*ids)


def test_generate_draws_the_same_from_a_file_and_tokenizers_as_from_the_folder(folder, file, tmp_path, capsys):
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    assert run("generate", "a red circle", "--steps", 1, "--params", folder, "--out", one) == 0
    tokenizers = [word for name in ("tokenizer", "tokenizer_2", "tokenizer_3") for word in ("--params", folder / name)]
    assert run("generate", "a red circle", "--steps", 1, "--params", file, *tokenizers, "--out", other) == 0
    from PIL import Image

    with Image.open(one) as first, Image.open(other) as second:
        assert first.tobytes() == second.tobytes()
    capsys.readouterr()
    assert run("inspect", other) == 0
    assert f"--params {file} --params {folder / 'tokenizer'} " in capsys.readouterr().out


def test_parts_and_dtypes_can_be_chosen(folder, tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    words = ("convert", folder, out, "--layout", "stability", "--dtype", "float16", "--only", "transformer,vae")
    assert run(*words) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{out}: transformer, vae"
    assert {value.dtype for value in load_file(out).values()} == {torch.float16}
    assert run("inspect", out) == 0
    text = capsys.readouterr().out
    assert "clip_l is missing (found in: text_encoder/" in text and "t5 is missing" in text


@pytest.mark.parametrize("size", ["", "many", "5QB", "-1", "0"])
def test_a_size_that_is_none_is_refused_before_anything_is_read(tmp_path, capsys, size):
    assert run("convert", tmp_path / "absent", tmp_path / "x", "--layout", "native", f"--shard-size={size}") == 1
    assert "must be a size such as 5GB, 500MiB or 1000000" in capsys.readouterr().err


def test_a_failed_conversion_is_one_line_and_leaves_the_old_file(folder, file, tmp_path, capsys):
    before = file.read_bytes()
    assert run("convert", tmp_path / "absent", file, "--layout", "single") == 1
    said = capsys.readouterr().err
    assert said == f"functional-sd3 convert: {tmp_path / 'absent'}: cannot be opened: no such file or directory\n"
    assert file.read_bytes() == before


def test_inspect_says_form_dtype_metadata_and_what_is_not_finite(file, capsys):
    tensors = load_file(file)
    tensors["first_stage_model.decoder.conv_in.bias"][3] = torch.nan
    save_file(tensors, file, metadata={"modelspec.title": "of a stranger"})
    assert run("inspect", file) == 0
    text = capsys.readouterr().out
    assert f"named as by Stability below first_stage_model., in {file}" in text
    assert "  first_stage_model.decoder.conv_in.bias holds NaN" in text
    assert text.count("all values are finite") == 4
    assert f"metadata of {file}: modelspec.title: of a stranger" in text
    assert "numbers, " in text and "MiB of float32" in text
    assert run("inspect", file, "--quick") == 0
    assert "finite" not in capsys.readouterr().out


def test_inspect_says_of_a_lora_its_layers_and_what_is_not_finite(tmp_path, capsys):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    layers = {f"transformer.transformer_blocks.{index}.attn.to_q": index for index in (0, 1)}
    tensors = {f"{layer}.lora_A.weight": torch.zeros(4, 8) for layer in layers}
    tensors |= {f"{layer}.lora_B.weight": torch.full((16, 4), 1.0 / index if index else math.inf)
                for layer, index in layers.items()}  # fmt: skip
    save_file(tensors, path, metadata={"ss_network_dim": "4"})
    for place in (path, tmp_path):
        assert run("inspect", place) == 0
        text = capsys.readouterr().out
        assert "LoRA: 4 tensors, 192 numbers" in text
        assert "  transformer.transformer_blocks.*.attn.to_q: 2 layers of rank 4, alpha 4" in text
        assert "  transformer.transformer_blocks.0.attn.to_q.lora_B.weight holds an infinity" in text
        assert f"metadata of {path}: ss_network_dim: 4" in text


def test_inspect_says_what_controlnets_ip_adapters_and_textual_inversions_are(tmp_path, capsys):
    net = controlnet.Config(depth=2, heads=2, head_dim=16, context_width=32, pooled_width=24, position_size=8)
    alone = replace(
        net, context_width=None, has_patch_embedding=False, position_size=None, zero_pooled=False, kind="depth"
    )
    for config, kind, path, owner in (
        (net, "diffusers", tmp_path / "net", "diffusers"),
        (alone, "stability", tmp_path / "net.safetensors", "Stability"),
    ):
        found = weights.controlnets.ControlNet(controlnet.init(prng.key(0), config), config)
        weights.save_controlnet(path, found, layout=kind)
        assert run("inspect", path) == 0
        text = capsys.readouterr().out
        assert "ControlNet: " in text and f"  named as by {owner}, in {path}\n  Config(depth=2, " in text
        assert "  all values are finite" in text
    sizes = ip_adapter.Config(
        attentions=1, width=32, head_dim=16, image_width=8, hidden_width=16, depth=1, heads=1, resampler_head_dim=16,
        tokens=2, mlp_width=8, time_frequencies=4,
    )  # fmt: skip
    adapter = weights.ip_adapters.IPAdapter(ip_adapter.init(prng.key(0), sizes), sizes)
    weights.save_ip_adapter(tmp_path / "ip.safetensors", adapter)
    assert run("inspect", tmp_path / "ip.safetensors") == 0
    assert "IP-Adapter: " in (text := capsys.readouterr().out) and "tokens=2, mlp_width=8" in text
    word = textual_inversion.Word("<cat>", {"clip_l": torch.full((2, 8), torch.nan), "t5": torch.zeros(2, 16)})
    weights.save_inversion(tmp_path / "cat.safetensors", word)
    assert run("inspect", tmp_path / "cat.safetensors") == 0
    text = capsys.readouterr().out
    assert "textual inversion: 2 tensors" in text and "  vectors: clip_l 2 x 8, t5xxl 2 x 16" in text
    assert "  clip_l holds NaN" in text


def test_inspect_shows_the_header_of_what_is_no_component(tmp_path, capsys):
    path = tmp_path / "lora.safetensors"
    save_file({"transformer.x.lora_A.weight": torch.zeros(4, 8, dtype=torch.bfloat16)}, path, metadata={"rank": "4"})
    assert run("inspect", path) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{path}: 1 tensors",
        "  transformer.x.lora_A.weight [4, 8] bfloat16",
        "metadata: rank: 4",
    ]
    assert err == f"functional-sd3 inspect: {path}: holds no LoRA: transformer.x.lora_A.weight\n"
    torch.save({"x": torch.zeros(1)}, tmp_path / "model.ckpt")
    assert run("inspect", tmp_path / "model.ckpt") == 1
    assert "is a pickle, which may run code" in capsys.readouterr().err
