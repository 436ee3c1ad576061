"""LoHa, LoKr, DoRA, LoCon and plain differences, as LyCORIS and ComfyUI define them: formulas written out once more."""

import json

import pytest
import torch
from safetensors.torch import save_file

from functional_sd3 import lora
from functional_sd3.core import tree
from functional_sd3.lora import keys as lora_keys
from functional_sd3.lora import tree as adapters
from functional_sd3.text import clip
from functional_sd3.transformer import mmdit
from functional_sd3.weights import WeightsError, quantize
from tests.lora.params import GENERATOR, PARAMS
from tests.weights.conftest import CONFIG

SHAPES = lora_keys.leaf_shapes(CONFIG)
LINEAR = ("lycoris_transformer_blocks_1_attn_to_out_0", "transformer.blocks.1.image.attention.out.weight")
PART = ("lycoris_transformer_blocks_1_attn_to_k", "transformer.blocks.1.image.attention.qkv.weight")
WIDE = ("lora_unet_joint_blocks_1_x_block_mlp_fc1", "transformer.blocks.1.image.mlp.in.weight")
CONV = ("lora_unet_x_embedder_proj", "transformer.patch.weight")


def draw(*shape):
    return torch.randn(shape, generator=GENERATOR)


def written(path, layer, tensors, **metadata):
    named = {f"{layer}.{name}": torch.as_tensor(value).contiguous() for name, value in tensors.items()}
    save_file(named, path, metadata={name: json.dumps(value) for name, value in metadata.items()} or None)
    return path


def changed(file, path, scale=1.0, part=None):
    """The weight at `path`, or the middle third of its rows, before and after the LoRA; all other leaves are shared."""
    after = tree.flatten_paths(lora.apply(PARAMS, lora.load(file, CONFIG), scale))
    before = tree.flatten_paths(PARAMS)
    assert {place for place in before if after[place] is not before[place]} == {path}
    pair = before[path], after[path]
    if part is None:
        return pair
    for index in (0, 2):
        assert torch.equal(*(value.chunk(3)[index] for value in pair))
    return tuple(value.chunk(3)[1] for value in pair)


def close(first, second):
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer, path", [LINEAR, PART, WIDE])
def test_a_loha_is_the_product_entry_by_entry_scaled_by_alpha_over_rank(tmp_path, layer, path):
    third = 1 if path == PART[1] else None
    rows, inputs = SHAPES[path][0] // (3 if third else 1), SHAPES[path][1]
    factors = {
        f"hada_w{n}_{side}": draw(*size) for n in (1, 2) for side, size in {"a": (rows, 4), "b": (4, inputs)}.items()
    }
    before, after = changed(written(tmp_path / "a", layer, factors | {"alpha": 2.0}), path, 0.5, third)
    one, two = (factors[f"hada_w{n}_a"] @ factors[f"hada_w{n}_b"] for n in (1, 2))
    close(after, before + 0.5 * (2.0 / 4) * one * two)
    before, after = changed(written(tmp_path / "a", layer, factors), path, 1.0, third)
    close(after, before + one * two)


def test_a_loha_of_a_convolution_with_a_core(tmp_path):
    layer, path = CONV
    rows, inputs, *kernel = SHAPES[path]
    factors = {f"hada_t{n}": draw(3, 3, *kernel) for n in (1, 2)}
    factors |= {f"hada_w{n}_a": draw(3, rows) for n in (1, 2)} | {f"hada_w{n}_b": draw(3, inputs) for n in (1, 2)}
    rebuilt = [
        torch.einsum("ijkl,jr,ip->prkl", factors[f"hada_t{n}"], factors[f"hada_w{n}_b"], factors[f"hada_w{n}_a"])
        for n in (1, 2)
    ]
    before, after = changed(written(tmp_path / "a", layer, factors | {"alpha": 6.0}), path)
    close(after, before + 2.0 * rebuilt[0] * rebuilt[1])


LOKR = {
    # factors of w1 (4 x 2) and w2 (4 x 8) of a weight of 16 x 16; what divides alpha
    "both whole": ({"lokr_w1": (4, 2), "lokr_w2": (4, 8)}, None),
    "w2 of rank 3": ({"lokr_w1": (4, 2), "lokr_w2_a": (4, 3), "lokr_w2_b": (3, 8)}, 3),
    "w1 of rank 1": ({"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 2), "lokr_w2": (4, 8)}, 1),
    "both of rank 2": ({"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 8)}, 2),
}


@pytest.mark.parametrize("name", LOKR)
@pytest.mark.parametrize("layer, path", [LINEAR, PART])
def test_a_lokr_is_the_kronecker_product_scaled_by_alpha_over_rank_or_by_1(tmp_path, name, layer, path):
    sizes, rank = LOKR[name]
    factors = {key: draw(*size) for key, size in sizes.items()}
    matrix = lambda key: factors[key] if key in factors else factors[key + "_a"] @ factors[key + "_b"]  # noqa: E731
    # What LyCORIS writes as the alpha of whole matrices means nothing: 1e10 in some versions.
    alpha = 1e10 if rank is None else 6.0
    file = written(tmp_path / "a", layer, factors | {"alpha": alpha})
    before, after = changed(file, path, 0.5, 1 if path == PART[1] else None)
    scale = 1.0 if rank is None else 6.0 / rank
    close(after, before + 0.5 * scale * torch.kron(matrix("lokr_w1"), matrix("lokr_w2")))


@pytest.mark.parametrize("kind", ["whole", "flat", "core"])
def test_a_lokr_of_a_convolution(tmp_path, kind):
    layer, path = CONV
    rows, inputs, *kernel = SHAPES[path]
    left, right = draw(2, 2), draw(rows // 2, inputs // 2, *kernel)
    factors = {"lokr_w1": left, "lokr_w2": right}
    if kind != "whole":
        a, b, core = draw(3, rows // 2), draw(3, inputs // 2), draw(3, 3, *kernel)
        factors = {"lokr_w1": left, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core}
        right = torch.einsum("ijkl,jr,ip->prkl", core, b, a).contiguous()
    if kind == "flat":
        a, b = draw(rows // 2, 3), draw(3, inputs // 2 * 4)
        factors, right = {"lokr_w1": left, "lokr_w2_a": a, "lokr_w2_b": b}, (a @ b).reshape(right.shape)
    before, after = changed(written(tmp_path / "a", layer, factors | {"alpha": 3.0}), path)
    close(after, before + torch.kron(left[:, :, None, None], right))


def test_a_locon_with_a_core(tmp_path):
    layer, path = CONV
    rows, inputs, *kernel = SHAPES[path]
    up, core, down = draw(rows, 3, 1, 1), draw(3, 3, *kernel), draw(3, inputs, 1, 1)
    tensors = {"lora_up.weight": up, "lora_mid.weight": core, "lora_down.weight": down, "alpha": 1.5}
    before, after = changed(written(tmp_path / "a", layer, tensors), path)
    close(after, before + 0.5 * torch.einsum("mnkl,im,nj->ijkl", core, up[:, :, 0, 0], down[:, :, 0, 0]))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("layer, path", [LINEAR, PART, WIDE, CONV])
def test_a_dora_gives_rows_or_columns_their_norms(tmp_path, layer, path, axis):
    third = 1 if path == PART[1] else None
    rows, *rest = SHAPES[path][0] // (3 if third else 1), *SHAPES[path][1:]
    tensors = {
        "lora_down.weight": draw(2, *rest),
        "lora_up.weight": draw(rows, 2, *[1] * (len(rest) - 1)),
        "alpha": 1.0,
    }
    shape = [1] * (1 + len(rest))
    shape[axis] = (rows, *rest)[axis]
    tensors["dora_scale"] = draw(*shape).abs()
    file = written(tmp_path / "a", layer, tensors)
    before, after = changed(file, path, 1.0, third)
    product = 0.5 * (tensors["lora_up.weight"].flatten(1) @ tensors["lora_down.weight"].flatten(1)).reshape(
        before.shape
    )
    others = [each for each in range(before.ndim) if each != axis]
    trained = before + product
    trained = trained / trained.square().sum(others, keepdim=True).sqrt() * tensors["dora_scale"]
    close(after, trained)
    close(after.square().sum(others, keepdim=True).sqrt(), tensors["dora_scale"])
    close(changed(file, path, 0.25, third)[1], before + 0.25 * (trained - before))


def test_a_dora_of_scale_zero_and_one_whose_rows_are_zero(tmp_path):
    layer, path = LINEAR
    tensors = {"lora_down.weight": draw(2, 16), "lora_up.weight": draw(16, 2), "dora_scale": torch.ones(16, 1)}
    one = lora.load(written(tmp_path / "a", layer, tensors), CONFIG)
    assert not tree.diff(lora.apply(PARAMS, one, 0.0), PARAMS)
    tensors["lora_up.weight"][3] = 0.0
    one = lora.load(written(tmp_path / "a", layer, tensors), CONFIG)
    empty = tree.map_with_path(lambda place, leaf: leaf * 0 if place == path else leaf, PARAMS)
    assert tree.flatten_paths(lora.apply(empty, one))[path].isfinite().all()


@pytest.mark.parametrize("suffix, layer, path", [
    ("diff", *LINEAR), ("diff", *CONV), ("diff_b", LINEAR[0], LINEAR[1].replace("weight", "bias")),
    ("diff_b", PART[0], PART[1].replace("weight", "bias")),
    ("w_norm", "lora_unet_joint_blocks_1_x_block_attn_ln_q", "transformer.blocks.1.image.attention.query_norm.weight"),
    ("w_norm", "lora_te1_text_model_final_layer_norm", "clip_l.final_norm.weight"),
    ("b_norm", "lora_te1_text_model_final_layer_norm", "clip_l.final_norm.bias"),
    ("w_norm", "lora_te3_encoder_final_layer_norm", "t5.final_norm.weight"),
])  # fmt: skip
def test_differences_of_weights_biases_and_norms_are_added(tmp_path, suffix, layer, path):
    third = 1 if path.startswith(PART[1][:-6]) else None
    rows, *rest = SHAPES[path]
    difference = draw(rows // 3 if third else rows, *rest)
    before, after = changed(written(tmp_path / "a", layer, {suffix: difference}), path, 0.5, third)
    close(after, before + 0.5 * difference)


def test_a_loras_bias_is_scaled_as_its_product(tmp_path):
    layer, path = "transformer.transformer_blocks.1.attn.to_out.0", LINEAR[1]
    tensors = {"lora_A.weight": draw(2, 16), "lora_B.weight": draw(16, 2), "lora_B.bias": draw(16), "alpha": 3.0}
    file = written(tmp_path / "a", layer, tensors)
    after = tree.flatten_paths(lora.apply(PARAMS, lora.load(file, CONFIG)))
    before = tree.flatten_paths(PARAMS)
    close(after[path], before[path] + 1.5 * tensors["lora_B.weight"] @ tensors["lora_A.weight"])
    bias = path.replace("weight", "bias")
    close(after[bias], before[bias] + 1.5 * tensors["lora_B.bias"])


def mixed(tmp_path, *, magnitude=True):
    """A file with every kind, in several layers."""
    tensors = {
        f"{PART[0]}.lokr_w1": draw(4, 2), f"{PART[0]}.lokr_w2": draw(4, 8), f"{WIDE[0]}.diff": draw(64, 16),
        "lora_unet_joint_blocks_2_x_block_attn_qkv.diff_b": draw(48),
        "lycoris_transformer_blocks_1_attn_to_q.diff_b": draw(16),
        "lora_te1_text_model_encoder_layers_1_mlp_fc1.lora_down.weight": draw(2, 16),
        "lora_te1_text_model_encoder_layers_1_mlp_fc1.lora_up.weight": draw(24, 2),
        "lora_unet_joint_blocks_0_x_block_mlp_fc2.lora_down.weight": draw(2, 64),
        "lora_unet_joint_blocks_0_x_block_mlp_fc2.lora_up.weight": draw(16, 2),
    }  # fmt: skip
    tensors |= {f"{LINEAR[0]}.hada_w{n}_{side}": draw(*size) for n in (1, 2) for side, size in
                {"a": (16, 2), "b": (2, 16)}.items()}  # fmt: skip
    if magnitude:
        tensors["lora_unet_joint_blocks_0_x_block_mlp_fc2.dora_scale"] = draw(16, 1).abs()
    save_file(tensors, tmp_path / "mixed.safetensors")
    return lora.load(tmp_path / "mixed.safetensors", CONFIG)


def velocity(params):
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(size, generator=generator) for size in ((2, 16, 8, 4), (2, 5, 48), (2, 40))]
    t = torch.tensor([0.2, 0.9])
    velocity = mmdit.apply(params["transformer"], CONFIG.transformer, inputs[0], t, *inputs[1:])
    return velocity, clip.apply(params["clip_l"], CONFIG.clip_l, torch.arange(40).reshape(2, 20)).projected


def test_every_kind_applies_lazily_to_plain_and_to_quantized_weights_as_merged(tmp_path):
    one, base = mixed(tmp_path), {name: PARAMS[name] for name in ("transformer", "clip_l", "clip_g", "t5")}
    merged = velocity(lora.apply(base, one, 0.6))
    for lazy, plain in zip(velocity(lora.apply(base, one, 0.6, lazy=True)), velocity(base), strict=True):
        assert (lazy - plain).abs().max() > 0.05
    for lazy, both in zip(velocity(lora.apply(base, one, 0.6, lazy=True)), merged, strict=True):
        torch.testing.assert_close(lazy, both, rtol=1e-4, atol=1e-4)
    small = quantize.quantize(base)
    lazy = lora.apply(small, one, 0.6, lazy=True)
    assert tree.flatten_paths(lazy)[LINEAR[1]].dtype == torch.int8
    expected = velocity(lora.apply(quantize.dequantize(small), one, 0.6))
    for own, both in zip(velocity(lazy), expected, strict=True):
        torch.testing.assert_close(own, both, rtol=1e-4, atol=1e-4)


def test_unmerging_gives_every_bit_back(tmp_path):
    merged = lora.merge(PARAMS, mixed(tmp_path), 0.7)
    assert tree.diff(merged.params, PARAMS) and not tree.diff(lora.unmerge(merged), PARAMS)


def test_sums_and_low_rank_forms_of_other_kinds(tmp_path):
    one, two = mixed(tmp_path, magnitude=False), mixed(tmp_path, magnitude=False)
    together = lora.apply(PARAMS, [one, two], [0.5, -2.0])
    assert tree.allclose(lora.apply(PARAMS, lora.combine([one, two], [0.5, -2.0])), together, rtol=1e-4, atol=1e-4)
    whole = lora.resize(one, 64)
    assert tree.allclose(lora.apply(PARAMS, whole), lora.apply(PARAMS, one), rtol=1e-4, atol=1e-4)
    assert adapters.is_low_rank(adapters.entries(whole)[WIDE[1]])
    with pytest.raises(ValueError, match="`lora.resize` makes a LoRA"):
        lora.save(tmp_path / "out.safetensors", one)
    for wrong in (lora.resize, lambda dora, rank: lora.combine([dora, dora])):
        with pytest.raises(ValueError, match="what a DoRA adds depends on the weight"):
            wrong(mixed(tmp_path), 2)


@pytest.mark.parametrize("dtype, device", [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")])
def test_pytorchs_defaults_change_nothing(tmp_path, dtype, device):
    one = mixed(tmp_path)
    expected = lora.apply(PARAMS, one, 0.5)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            loaded = lora.load(tmp_path / "mixed.safetensors", CONFIG)
            found = lora.apply(PARAMS, loaded, 0.5)
            lora.apply(PARAMS, loaded, 0.5, lazy=True)
    finally:
        torch.set_default_dtype(before)
    assert not tree.diff(loaded, one) and not tree.diff(found, expected)


def test_info_and_inspect_name_the_kinds(tmp_path, capsys):
    from functional_sd3 import cli

    mixed(tmp_path)
    assert cli.main(["inspect", str(tmp_path / "mixed.safetensors")]) == 0
    assert "attn_to_k: 1 layers, LoKr" in capsys.readouterr().out
    assert cli.main(["lora", "info", str(tmp_path / "mixed.safetensors"), "--all"]) == 0
    said = capsys.readouterr().out
    for line in (
        "attn_to_k: LoKr, 40 numbers",
        "attn_to_out_0: 16 -> 16, rank 2, alpha 2, LoHa",
        "mlp_fc1: difference, 1,024",
    ):
        assert line in said
    assert "mlp_fc2: 64 -> 16, rank 2, alpha 2, LoRA with magnitudes (DoRA)" in said


def test_weights_in_one_byte_say_what_to_do(tmp_path):
    one = mixed(tmp_path)
    with pytest.raises(ValueError, match=r"torch.int8 with a scale: apply the LoRA with lazy=True"):
        lora.apply(quantize.quantize(PARAMS), one)
    with pytest.raises(ValueError, match=r"torch.float8_e4m3fn without a scale.*`convert --dtype bfloat16` first"):
        lora.apply(tree.map(lambda leaf: leaf.to(torch.float8_e4m3fn), PARAMS), one)


FIT = {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16)}


@pytest.mark.parametrize("sizes, said", [
    (FIT | {"hada_w1_b": (3, 16)}, "has rank 2, hada_w1_b has 3"),
    (FIT | {"hada_w1_a": (8, 2)}, r"is \[8, 2\] beside \[2, 16\], the layer is \[16, 16\]; is the LoRA for another"),
    ({"hada_w1_a": (16, 2)}, "has no hada_w1_b beside it"),
    ({"lokr_w1": (4, 2), "lokr_w2": (4, 4)}, r"of a Kronecker product of \[4, 2\] and \[4, 4\], the layer is"),
    ({"lokr_w1": (4, 2)}, "has no lokr_w2_a beside it"),
    ({"lokr_w1": (4, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (3, 8)}, "which have no product"),
    (FIT | {"lokr_w1": (4, 2)}, "are of two kinds: LoHa and LoKr"),
    (FIT | {"diff": (16, 16)}, "are of two kinds: LoHa and difference"),
    ({"diff": (16, 8)}, r"is \[16, 8\], the layer is \[16, 16\]"),
    ({"diff_b": (8,)}, r"is \[8\], the layer's bias is \[16\]"),
    ({"dora_scale": (16, 1)}, "has no down, no up and no other factor"),
    (FIT | {"dora_scale": (8, 1)}, r"is \[8, 1\], the layer"),
    (FIT | {"dora_scale": (16, 16)}, r"is \[16, 16\], not one number a row"),
    ({"diff": (16, 16), "lora_B.bias": (16,)}, "bias of a LoRA whose down and up are not there"),
    ({"alpha": (1,)}, "has no down, no up and no other factor"),
])  # fmt: skip
def test_factors_that_are_wrong_are_named(tmp_path, sizes, said):
    file = written(tmp_path / "a", LINEAR[0], {name: draw(*size) for name, size in sizes.items()})
    with pytest.raises(WeightsError, match=said):
        lora.load(file, CONFIG)
