"""LoHa, LoKr and DoRA against PEFT: its layers over a linear layer and a convolution, saved as it saves them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from functional_sd3 import lora
from functional_sd3.core import tree
from functional_sd3.lora import keys as lora_keys
from functional_sd3.weights import WeightsError
from tests.weights.conftest import CONFIG

peft = pytest.importorskip("peft")

SHAPES = lora_keys.leaf_shapes(CONFIG)
WIDE = "transformer.blocks.1.image.mlp.in"
CONV = "transformer.patch"
QUERY = "transformer.blocks.1.image.attention.qkv"


class Block(nn.Module):
    """The layers of diffusers' transformer that are adapted, under their names."""

    def __init__(self):
        super().__init__()
        rows, inputs = SHAPES[WIDE + ".weight"]
        self.transformer_blocks = nn.ModuleList([nn.Module(), nn.Module()])
        self.transformer_blocks[1].ff = nn.Module()
        self.transformer_blocks[1].ff.net = nn.ModuleList([nn.Module()])
        self.transformer_blocks[1].ff.net[0].proj = nn.Linear(inputs, rows)
        self.transformer_blocks[1].attn = nn.Module()
        self.transformer_blocks[1].attn.to_q = nn.Linear(inputs, inputs)
        rows, inputs, *kernel = SHAPES[CONV + ".weight"]
        self.pos_embed = nn.Module()
        self.pos_embed.proj = nn.Conv2d(inputs, rows, kernel, stride=kernel)

    def layers(self):
        return self.transformer_blocks[1].ff.net[0].proj, self.transformer_blocks[1].attn.to_q, self.pos_embed.proj


LINEAR, EVERY = ["proj", "to_q"], ["net.0.proj", "to_q", "pos_embed.proj"]
CONFIGS = {
    "LoRA with biases": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=EVERY, lora_bias=True),
    "rsLoRA": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=EVERY, use_rslora=True),
    "DoRA": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=EVERY, use_dora=True),
    "LoHa": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=EVERY, rank_pattern={"to_q": 2}),
    "LoHa with cores": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=EVERY, use_effective_conv2d=True),
    "LoKr": lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=EVERY, alpha_pattern={"to_q": 3}),
    "LoKr of whole matrices": lambda: peft.LoKrConfig(r=16, alpha=5, target_modules=EVERY),
    "LoKr with cores": lambda: peft.LoKrConfig(
        r=2, alpha=5, target_modules=EVERY, use_effective_conv2d=True, decompose_both=True
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", ["folder", "metadata"])
def test_merged_weights_equal_pefts(tmp_path, name, form):
    torch.manual_seed(4)
    model = Block()
    before = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in model.layers()]
    adapted = peft.get_peft_model(model, CONFIGS[name]())
    with torch.no_grad():
        for key, value in adapted.named_parameters():
            if value.requires_grad:
                value.copy_(torch.randn_like(value).abs() if "magnitude" in key else 0.3 * torch.randn_like(value))
    if form == "folder":
        adapted.save_pretrained(tmp_path)
        file = tmp_path
    else:
        file = as_diffusers_writes(tmp_path, adapted)
    params = {"transformer": {"patch": parts(before[2]), "blocks": [{}, {"image": {
        "mlp": {"in": parts(before[0])},
        "attention": {"qkv": {"weight": before[1][0].repeat(3, 1), "bias": before[1][1].repeat(3)}},
    }}]}}  # fmt: skip
    after = tree.flatten_paths(lora.apply(params, lora.load(file, CONFIG)))
    merged = adapted.merge_and_unload().layers()
    for path, layer in zip((WIDE, QUERY, CONV), merged, strict=True):
        for leaf in ("weight", "bias"):
            own = after[f"{path}.{leaf}"].chunk(3)[0] if path == QUERY else after[f"{path}.{leaf}"]
            torch.testing.assert_close(own, getattr(layer, leaf).detach(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after[WIDE + ".weight"], before[0][0], atol=0.01)


def parts(pair):
    return dict(zip(("weight", "bias"), pair, strict=True))


def as_diffusers_writes(folder, adapted):
    """Keys with the component before them, and PEFT's config in the metadata."""
    state = peft.get_peft_model_state_dict(adapted)
    tensors = {key.replace("base_model.model.", "transformer."): value.contiguous() for key, value in state.items()}
    arguments = adapted.peft_config["default"].to_dict()
    said = {
        f"transformer.{name}": value
        for name, value in arguments.items()
        if isinstance(value, int | float | dict | None)
    }
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(said)})
    return file


@pytest.mark.filterwarnings("ignore")
def test_peft_methods_without_a_formula_here_are_named(tmp_path):
    adapted = peft.get_peft_model(Block(), peft.OFTConfig(r=2, oft_block_size=0, target_modules=LINEAR[1:]))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="part of an OFT or BOFT, which is not supported"):
        lora.load(tmp_path, CONFIG)
