"""Specs of every network of the library: the logical axes of their leaves, and what can be divided among processes."""

import pytest

from functional_sd3 import lora, mmdit, t5, vae
from functional_sd3.core import spec as specs
from functional_sd3.core.spec import AXES, FUSED, Param
from functional_sd3.image import taesd
from functional_sd3.layouts.components import Config
from functional_sd3.metrics import inception
from functional_sd3.text import clip
from functional_sd3.text.clip import dual
from functional_sd3.training.objectives import scm
from functional_sd3.transformer import controlnet, ip_adapter

TRANSFORMERS = {
    "sd3-medium": mmdit.spec(mmdit.SD3_MEDIUM),
    "sd3.5-medium": mmdit.spec(mmdit.SD35_MEDIUM),
    "sd3.5-large": mmdit.spec(mmdit.SD35_LARGE),
}
NETWORKS = TRANSFORMERS | {
    "meanflow": mmdit.spec(mmdit.Config(depth=2, heads=4, interval_size=64)),
    "clip_l": clip.spec(clip.CLIP_L),
    "clip_g": clip.spec(clip.CLIP_G),
    "clip_dual": dual.spec(dual.VIT_L14),
    "t5": t5.spec(t5.T5_XXL),
    "vae": vae.spec(vae.SD3_VAE),
    "taesd": taesd.spec(taesd.TAESD3),
    "controlnet": controlnet.spec(controlnet.SD35_LARGE),
    "controlnet with joint blocks": controlnet.spec(controlnet.Config(depth=12, heads=24, extra_channels=1)),
    "ip_adapter": ip_adapter.spec(ip_adapter.SD35_LARGE),
    "inception": inception.spec(),
    "scm": {"log_variance": scm.log_variance_spec()},
    "lora": lora.spec(Config(transformer=mmdit.SD35_MEDIUM, t5=t5.T5_XXL, clip_l=clip.CLIP_L), 16, lambda *_: True),
}
OF_THREE_CHANNELS = {"vae.decoder.conv_out.bias", "taesd.decoder.conv_out.bias"}
"""Biases of the three channels of an image."""


@pytest.mark.parametrize("name", NETWORKS)
def test_every_axis_of_a_network_has_a_known_name(name):
    for path, leaf in specs.paths(NETWORKS[name]).items():
        known = set(AXES) - {"in", "out"}
        unknown = [axis for axis, size in zip(leaf.axes, leaf.shape, strict=True) if axis not in known and size != 1]
        assert not unknown, f"{name}.{path} {leaf.shape} has axes {leaf.axes}"


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_axes_hold_matrices_of_equal_size(name):
    """The parts of a fused layer's outputs are as large as the axis that they are said to be of: an axis of queries,
    keys and values is three times as long as the inputs of the attention's output layer."""
    leaves = specs.paths(NETWORKS[name])
    for path, leaf in leaves.items():
        owner = path.rpartition(".")[0].rpartition(".")[0]
        after = leaves.get(f"{owner}.out.weight")
        if path.endswith(".weight") and leaf.axes[0] in FUSED and after is not None:
            part, count = FUSED[leaf.axes[0]]
            assert after.axes[1] == part and leaf.shape[0] == count * after.shape[1], path


LAYERS = {
    "attention.qkv": {("qkv", "width")},
    "attention2.qkv": {("qkv", "width")},
    "attention.out": {("width", "heads")},
    "attention2.out": {("width", "heads")},
    "mlp.in": {("hidden", "width"), ("gated", "width")},
    "mlp.out": {("width", "hidden")},
}
"""The layers of a block that tensor parallelism divides: outputs of the first, inputs of the second."""


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"vae", "lora"}))
def test_layers_of_a_block_are_named_so_that_heads_and_hidden_features_can_be_divided(name):
    for path, leaf in specs.paths(NETWORKS[name]).items():
        wanted = LAYERS.get(".".join(path.split(".")[-3:-1]))
        if wanted and path.endswith("weight"):
            assert leaf.axes in wanted, path
        elif wanted:
            assert leaf.axes in {axes[:1] for axes in wanted}, path


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("processes", [2, 4, 8, 16, 32, 64])
def test_every_parameter_of_a_released_transformer_divides_by_the_processes(name, processes):
    whole = [path for path, leaf in specs.paths(TRANSFORMERS[name]).items() if not _divisible(leaf, processes)]
    assert not whole


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_of_the_other_networks_divides_by_two(name):
    whole = {f"{name}.{path}" for path, leaf in specs.paths(NETWORKS[name]).items() if not _divisible(leaf, 2)}
    assert {path for path in whole - OF_THREE_CHANNELS if not path.endswith(("alpha", "logit_scale"))} == set()


def test_the_factors_of_a_lora_have_the_axes_of_the_layer_they_adapt():
    described = lora.spec(Config(transformer=mmdit.SD35_MEDIUM), 4)
    axes = {path: leaf.axes for path, leaf in specs.paths(described).items()}
    for path, names in axes.items():
        if path.endswith("up"):
            assert names == (("heads", "rank") if ".qkv." in path else ("width", "rank")), path
        elif path.endswith("down"):
            assert names == (("rank", "width") if ".qkv." in path else ("rank", "heads")), path


def test_a_leaf_needs_a_name_for_each_axis():
    with pytest.raises(ValueError, match="must name each of the 2 dimensions"):
        Param((2, 3), specs.zeros, ("width",))


def _divisible(leaf: Param, processes: int) -> bool:
    return any(axis is not None and size % processes == 0 for axis, size in zip(leaf.axes, leaf.shape, strict=True))
