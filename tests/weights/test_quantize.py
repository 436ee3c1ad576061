"""Weights in one byte: how far they may be off, that everything computes on them unchanged, and files of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.func import grad, vmap

from functional_sd3 import lora, weights
from functional_sd3.core import prng, tree
from functional_sd3.flow import schedule
from functional_sd3.image import vae
from functional_sd3.lora import keys as lora_keys
from functional_sd3.text import clip, t5
from functional_sd3.transformer import mmdit, precision
from functional_sd3.weights import WeightsError, quantize
from tests import models

FORMATS = [torch.int8, torch.float8_e4m3fn]
KEPT = [torch.float32, torch.bfloat16, torch.float16]
each_format = pytest.mark.parametrize("dtype", FORMATS, ids=str)
few = settings(max_examples=25)


def random_inputs(sizes):
    """Latents, context and pooled text of two samples."""
    shapes = (2, sizes.in_channels, 8, 8), (2, 5, sizes.context_width), (2, sizes.pooled_width)
    return [prng.normal(prng.key(index), shape) for index, shape in enumerate(shapes)]


def outputs(params, config):
    """What every component computes, by name."""
    ids = torch.tensor([[5, 7, 2, 1], [3, 2, 1, 1]])
    images = prng.normal(prng.key(9), (1, 3, 32, 32))
    noise, *told = random_inputs(config.transformer)
    t = torch.tensor([0.2, 0.8])
    return {
        "clip_l": clip.apply(params["clip_l"], config.clip_l, ids).penultimate,
        "t5": t5.apply(params["t5"], config.t5, ids),
        "vae": vae.decode(params["vae"], config.vae, vae.encode(params["vae"], config.vae, images).mean),
        "transformer": mmdit.apply(params["transformer"], config.transformer, noise, t, *told),
    }


@few
@given(st.integers(0, 2**31), st.sampled_from(FORMATS), st.sampled_from(KEPT), st.floats(-6, 6))
def test_every_weight_is_off_by_at_most_half_a_step(seed, dtype, kept, magnitude):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(5, 7, generator=generator) * 10.0**magnitude).clamp(-6e4, 6e4).to(kept)
    weight[2] = 0.0
    stored = quantize.quantize({"blocks": [{"weight": weight}]}, dtype)["blocks"][0]
    assert stored["weight"].dtype == dtype and stored["scale"].dtype == kept and stored["scale"].shape == (5,)
    scale = stored["scale"].float()[:, None]
    off = (stored["weight"].float() * scale - weight.float()).abs()
    if dtype == torch.int8:
        # The last half step may be cut off where the scale was rounded down.
        assert (off <= scale * (0.5 + 127 * torch.finfo(kept).eps)).all()
    else:
        # Three bits after the point, and steps of 2 ** -9 below 2 ** -6.
        assert (off <= torch.maximum(weight.float().abs() * 2**-4, scale * 2**-10) * 1.02).all()
    assert not stored["weight"][2].float().any()


@each_format
def test_quantising_again_what_was_dequantised_changes_nothing(model, dtype):
    once = quantize.dequantize(quantize.quantize(model.params["transformer"], dtype))
    again = quantize.dequantize(quantize.quantize(once, dtype))
    assert tree.allclose(again, once, rtol=1e-6, atol=1e-7)


@each_format
def test_only_weights_inside_blocks_are_stored_otherwise_and_nothing_is_written_to(model, dtype):
    copies = tree.map(torch.clone, model.params)
    stored = tree.flatten_paths(quantize.quantize(model.params, dtype))
    assert not tree.diff(model.params, copies)
    for path, leaf in tree.flatten_paths(model.params).items():
        inside = ".blocks." in path and lora_keys.adaptable(path, leaf.ndim)
        assert stored[path].dtype == dtype if inside else stored[path] is leaf
        assert (path.removesuffix("weight") + "scale" in stored) == inside


@each_format
@pytest.mark.parametrize("compute", [False, True], ids=["stored", "products"])
def test_weights_that_are_kept_stay_floats_from_the_start_or_later(model, dtype, compute):
    options = {"compute": {torch.int8: "int8", torch.float8_e4m3fn: "float8"}[dtype], "smallest": 0} if compute else {}
    keep = ["*.blocks.0.*", "*.mlp.out.weight"]
    early = quantize.quantize(model.params, dtype, keep=keep, **options)
    whole = quantize.quantize(model.params, dtype, **options)
    scaled = {f"{path.rpartition('.')[0]}.weight" for path in quantize.stored_scales(whole)}
    chosen = scaled & tree.select(model.params, keep).keys()
    assert not tree.diff(early, quantize.with_floats(whole, model.params, chosen))
    kept = tree.flatten_paths(early)
    assert chosen and all(kept[path].dtype == torch.float32 for path in chosen)
    assert {f"{path.rpartition('.')[0]}.weight" for path in quantize.stored_scales(early)} == scaled - chosen


@each_format
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_apply_works_unchanged_and_computes_what_the_dequantised_weights_give(model, dtype):
    stored = quantize.quantize(model.params, dtype)
    # Without oneDNN, whose fused layers take weights without a scale alone and round in another order.
    with torch.backends.mkldnn.flags(enabled=False):
        exact, meant, found = (
            outputs(params, model.config) for params in (model.params, quantize.dequantize(stored), stored)
        )
    for name in found:
        assert torch.equal(found[name], meant[name]), name
        error = float((found[name] - exact[name]).norm() / exact[name].norm())
        assert 1e-4 < error < (0.05 if dtype == torch.int8 else 0.2), (name, error)


@each_format
def test_a_lora_goes_beside_stored_weights_and_learns_there(model, dtype):
    stored = quantize.quantize(model.params, dtype)
    one = lora.init(prng.key(1), model.config, 2)
    one = tree.map_with_path(lambda path, leaf: leaf + 0.1 if path.endswith("up") else leaf, one)
    velocity = lambda params: outputs(params, model.config)["transformer"]  # noqa: E731
    beside = velocity(lora.apply(stored, one, lazy=True))
    merged = velocity(lora.apply(quantize.dequantize(stored), one))
    torch.testing.assert_close(beside, merged, rtol=1e-3, atol=1e-4)
    slope = grad(lambda given: velocity(lora.apply(stored, given, lazy=True)).square().mean())(one)
    assert sum(float(leaf.abs().sum()) for leaf in tree.leaves(slope)) > 0
    with pytest.raises(ValueError, match=r"is stored in .*: apply the LoRA with lazy=True"):
        lora.apply(stored, one)


@each_format
def test_transforms_see_through_stored_weights(model, dtype):
    stored, sizes = quantize.quantize(model.params["transformer"], dtype), model.config.transformer
    x, context, pooled = random_inputs(sizes)
    one = lambda x, t, c, p: mmdit.apply(stored, sizes, x[None], t[None], c[None], p[None])[0]  # noqa: E731
    t = torch.tensor([0.1, 0.7])
    mapped = vmap(one)(x, t, context, pooled)
    torch.testing.assert_close(mapped, mmdit.apply(stored, sizes, x, t, context, pooled), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(grad(lambda x: one(x, t[0], context[0], pooled[0]).sum())(x[0])).all()


@each_format
def test_stored_weights_with_a_lora_beside_them_are_one_graph(dtype):
    # Every kind of layer is in one block with a second attention: more are traced over and over.
    model = models.random_model(models.config(depth=1))
    sizes = model.config.transformer
    params = lora.apply(quantize.quantize(model.params, dtype), lora.init(prng.key(1), model.config, 2), lazy=True)
    x, context, pooled = random_inputs(sizes)
    velocity = lambda params, x, t: mmdit.apply(params["transformer"], sizes, x, t, context, pooled)  # noqa: E731
    compiled = torch.compile(velocity, backend="eager", fullgraph=True)
    t = torch.tensor([0.1, 0.7])
    torch.testing.assert_close(compiled(params, x, t), velocity(params, x, t))


@each_format
def test_the_transformer_of_sd35_large_needs_at_most_8_3_gigabytes(dtype):
    params = mmdit.init(prng.key(0), mmdit.SD35_LARGE, dtype=torch.bfloat16, device="meta")
    stored = quantize.quantize(params, dtype)
    assert tree.nbytes(params) > 16e9
    assert tree.nbytes(stored) <= 8.3e9


def test_errors_are_told_for_every_weight(model):
    params = model.params["transformer"]
    stored = quantize.quantize(params)
    rows = quantize.errors(params, stored)
    meant = tree.flatten_paths(quantize.dequantize(stored))
    assert len(rows) == sum(path.endswith(".scale") for path in tree.flatten_paths(stored))
    for row in rows:
        before = tree.flatten_paths(params)[row.path]
        assert row.relative == pytest.approx(float((meant[row.path] - before).norm() / before.norm()), rel=1e-4)
        assert 1e-4 < row.relative < 0.02


def test_the_error_of_the_velocity_is_measured_along_the_run_of_the_reference(model):
    params, sizes = model.params["transformer"], model.config.transformer
    noise, *told = random_inputs(sizes)
    sigmas = schedule.sigmas(3)
    measure = lambda other: precision.velocity_errors(params, other, sizes, noise, sigmas, *told)  # noqa: E731
    assert not measure(params).any() and measure(params).shape == (3,)
    doubled = {**params, "final": {**params["final"], "out": tree.map(lambda leaf: 2 * leaf, params["final"]["out"])}}
    torch.testing.assert_close(measure(doubled), torch.ones(3), rtol=1e-4, atol=1e-4)
    errors = measure(quantize.quantize(params))
    assert (errors > 1e-4).all() and (errors < 0.1).all()


@each_format
@pytest.mark.parametrize("form", ["model.safetensors", "folder"])
def test_stored_weights_are_saved_and_loaded_as_they_are_or_as_floats(model, tmp_path, dtype, form):
    stored = quantize.quantize(tree.cast(model.params, torch.bfloat16), dtype)
    weights.save(tmp_path / form, model._replace(params=stored), layout="native")
    kept = weights.load(tmp_path / form, quantized=True)
    assert not tree.diff(kept.params, stored) and kept.config.transformer == model.config.transformer
    floats = weights.load(tmp_path / form, dtype=torch.bfloat16)
    assert tree.allclose(floats.params, quantize.dequantize(stored), rtol=2**-7, atol=0)
    assert tree.nbytes(kept.params["transformer"]) < 0.7 * tree.nbytes(floats.params["transformer"])


def test_scaled_float8_of_comfyui_may_stay_as_it_is(model, tmp_path):
    only = model._replace(params={"transformer": model.params["transformer"]})
    weights.save(tmp_path / "plain.safetensors", only, layout="single")
    tensors = load_file(tmp_path / "plain.safetensors")
    for name in [name for name in tensors if ".attn" in name and name.endswith(".weight") and "ln_" not in name]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[name.removesuffix("weight") + "scale_weight"] = scale
    save_file(tensors, tmp_path / "scaled.safetensors")
    kept = weights.load(tmp_path / "scaled.safetensors", quantized=True)
    floats = weights.load(tmp_path / "scaled.safetensors")
    layer = kept.params["transformer"]["blocks"][0]["image"]["attention"]["qkv"]
    assert layer["weight"].dtype == torch.float8_e4m3fn and layer["scale"].shape == layer["weight"].shape[:1]
    assert not tree.diff(quantize.dequantize(kept.params), floats.params)


def test_mistakes_are_named(model, tmp_path):
    with pytest.raises(ValueError, match="dtype torch.float16 must be one of torch.int8, torch.float8_e4m3fn"):
        quantize.quantize(model.params, torch.float16)
    with pytest.raises(ValueError, match="targets 'norm' choose no weight"):
        quantize.quantize(model.params, targets="norm")
    with pytest.raises(ValueError, match=r"no weight of a layer inside blocks that keep '\*' leaves"):
        quantize.quantize(model.params, keep="*")
    once = quantize.quantize(model.params)
    with pytest.raises(ValueError, match=r"stored in a byte already: for another format `quantize.dequantize` them"):
        quantize.quantize(once, torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"vae.decoder.out.weight is not stored with a scale"):
        quantize.with_floats(once, model.params, ["vae.decoder.out.weight"])
    with pytest.raises(ValueError, match=r"blocks.0.weight has values that are not finite"):
        quantize.quantize({"blocks": [{"weight": torch.full((2, 2), float("inf"))}]})
    stored = model._replace(params=quantize.quantize(model.params))
    for options in ({"layout": "diffusers"}, {"layout": "native", "dtype": torch.float16}):
        with pytest.raises(ValueError, match="quantised weights are saved with layout="):
            weights.save(tmp_path / "out", stored, **options)
    scales = tree.map_with_path(lambda path, leaf: leaf[:2] if path.endswith("scale") else leaf, stored.params)
    with pytest.raises(WeightsError, match=r"qkv.scale has shape \[2\], expected one number for each row, \[96\]"):
        weights.save(tmp_path / "out", stored._replace(params=scales), layout="native")
    bare = tree.map(lambda leaf: leaf.to(torch.int8) if leaf.ndim == 2 else leaf, model.params)
    with pytest.raises(WeightsError, match="has dtype torch.int8, not a float"):
        weights.save(tmp_path / "out", model._replace(params=bare), layout="native")
