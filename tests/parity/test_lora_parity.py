"""LoRAs against diffusers and PEFT: applied as they fuse, in all key spellings, and written so that they load them."""

from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import state_dict_utils
from safetensors.torch import load_file

from functional_sd3 import lora, weights
from functional_sd3.core import prng, tree
from functional_sd3.layouts import rules
from functional_sd3.layouts.diffusers_folder import COMPONENTS
from functional_sd3.lora import tree as adapters
from tests.lora.files import pair, write
from tests.parity.whole_models import config_of, random_model

CONFIG = replace(config_of("SD3.5-medium"), t5=None)
MODEL = random_model(CONFIG)
TARGETS = ("transformer.*", "clip_l.blocks.*", "clip_g.blocks.*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    weights.save(path, MODEL)
    return path


def pipeline(folder):
    return StableDiffusion3Pipeline.from_pretrained(
        folder, tokenizer=None, tokenizer_2=None, tokenizer_3=None, text_encoder_3=None, low_cpu_mem_usage=False
    )


def random_lora(rank=2, alpha=3.0, targets=TARGETS):
    generator = torch.Generator().manual_seed(3)
    fresh = lora.init(prng.key(0), CONFIG, rank, targets, alpha=alpha)
    draw = lambda path, leaf: leaf if path.endswith("alpha") else torch.randn(leaf.shape, generator=generator)  # noqa: E731
    return tree.map_with_path(draw, fresh)


def assert_same(pipe, params):
    for name in ("transformer", "clip_l", "clip_g"):
        described = weights.SPECS[name](getattr(CONFIG, name))
        ours = rules.to_theirs(COMPONENTS[name].layout, described, tree.flatten_paths(params[name]))
        theirs = getattr(pipe, COMPONENTS[name].folder).state_dict()
        theirs = {key.replace("base_layer.", ""): value for key, value in theirs.items() if "lora_" not in key}
        for key, value in ours.items():
            actual = theirs[key if key in theirs else key.removeprefix("text_model.")]
            torch.testing.assert_close(value, actual, rtol=1e-5, atol=1e-5, msg=lambda said, key=key: f"{key}: {said}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("alpha", [2.0, 3.0])
def test_diffusers_fuses_our_files_as_we_apply_them(folder, tmp_path, alpha):
    one = adapters.build(
        adapters.entries(random_lora(alpha=alpha))
        | adapters.entries(random_lora(rank=3, alpha=alpha, targets="transformer.blocks.*.mlp.*"))
        | adapters.entries(random_lora(rank=2, alpha=0.5, targets="transformer.blocks.1.image.attention.*"))
    )
    lora.save(tmp_path / "pytorch_lora_weights.safetensors", one)
    pipe = pipeline(folder)
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora(components=["transformer", "text_encoder", "text_encoder_2"], lora_scale=0.7)
    assert_same(pipe, lora.apply(MODEL.params, one, 0.7))


@pytest.mark.filterwarnings("ignore")
def test_files_that_diffusers_wrote_apply_as_in_diffusers(folder, tmp_path):
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = pipeline(folder)
    arguments = LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=False,
        target_modules=["attn.to_k", "attn.to_q", "attn2.to_v", "attn.add_q_proj", "attn.to_out.0", "ff.net.0.proj"],
        rank_pattern={"attn.to_q": 2}, alpha_pattern={"attn.to_k": 5},
    )  # fmt: skip
    pipe.transformer.add_adapter(arguments)
    state = get_peft_model_state_dict(pipe.transformer)
    metadata = _collate_lora_metadata({"transformer": pipe.transformer})
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=state, **metadata)
    loaded = lora.load(tmp_path, CONFIG)
    pipe.fuse_lora(components=["transformer"])
    assert_same(pipe, lora.apply(MODEL.params, loaded))
    parts = [part for node in adapters.entries(loaded).values() for part in adapters.members(node)]
    assert {float(part["alpha"]) for part in parts} == {5, 6} and {adapters.rank(part) for part in parts} == {2, 4}


@pytest.mark.parametrize("place, spelling, names", [
    ("attn", ".lora.", ("to_q", "to_k", "to_v", "to_out.0")),
    ("attn.processor", "_lora.", ("to_q", "to_k", "to_v", "to_out")),
])  # fmt: skip
def test_old_spellings_of_the_transformer_are_what_diffusers_converts_them_to(tmp_path, place, spelling, names):
    tensors = {}
    for name in names:
        for side, value in zip(("down", "up"), pair(16, 16), strict=True):
            tensors[f"transformer.transformer_blocks.1.{place}.{name}{spelling}{side}.weight"] = value
    old = lora.load(write(tmp_path / "old.safetensors", tensors), CONFIG)
    converted = state_dict_utils.convert_unet_state_dict_to_peft(tensors)
    new = lora.load(write(tmp_path / "new.safetensors", converted), CONFIG)
    assert not tree.diff(old, new) and len(adapters.entries(old)) == 2


@pytest.mark.parametrize("names, spelling", [
    (("q_proj", "k_proj", "v_proj", "out_proj"), ".lora_linear_layer."), (("to_q", "to_k", "to_v", "to_out"), "_lora."),
])  # fmt: skip
def test_old_spellings_of_the_text_encoders_are_what_diffusers_converts_them_to(tmp_path, names, spelling):
    stem = "text_encoder_2.text_model.encoder.layers.0.self_attn."
    tensors = {}
    for name in names:
        for side, value in zip(("down", "up"), pair(24, 24), strict=True):
            tensors[f"{stem}{name}{spelling}{side}.weight"] = value
    old = lora.load(write(tmp_path / "old.safetensors", tensors), CONFIG)
    converted = state_dict_utils.convert_state_dict_to_peft(tensors)
    new = lora.load(write(tmp_path / "new.safetensors", converted), CONFIG)
    assert not tree.diff(old, new) and len(adapters.entries(old)) == 2


def test_our_keys_are_those_of_diffusers_own_modules(folder, tmp_path):
    lora.save(tmp_path / "lora.safetensors", random_lora())
    pipe = pipeline(folder)
    modules = {
        f"{part}.{name.removeprefix('text_model.')}": module
        for part in ("transformer", "text_encoder", "text_encoder_2")
        for name, module in getattr(pipe, part).named_modules()
    }
    for key, value in load_file(tmp_path / "lora.safetensors").items():
        layer, _, side = key.replace("text_model.", "").removesuffix(".weight").rpartition(".")
        weight = modules[layer].weight
        assert value.shape[0 if side == "lora_B" else 1] == weight.shape[0 if side == "lora_B" else 1], key
