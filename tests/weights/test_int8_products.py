"""Trees with products of int8: which layers, what they compute, their errors, files of them."""

import pytest
import torch

from functional_sd3 import lora, weights
from functional_sd3.core import layers, prng, transform, tree
from functional_sd3.kernels import int8_functions
from functional_sd3.transformer import mmdit
from functional_sd3.weights import quantize
from functional_sd3.weights.product_errors import product_errors
from tests import choices

pytestmark = pytest.mark.skipif(int8_functions.product() is None, reason="needs products of int8 that are right")


@pytest.fixture(autouse=True)
def products_of_any_size(monkeypatch):
    choices.use(monkeypatch)


@pytest.fixture(scope="module")
def stored(model):
    return quantize.quantize(model.params, compute="int8", smallest=0)


def velocity(params, model, dtype=torch.float32, **options):
    sizes = model.config.transformer
    shapes = (2, sizes.in_channels, 8, 8), (2, 5, sizes.context_width), (2, sizes.pooled_width)
    x, context, pooled = (prng.normal(prng.key(index), shape).to(dtype) for index, shape in enumerate(shapes))
    return mmdit.apply(params["transformer"], sizes, x, torch.tensor([0.2, 0.8]), context, pooled, **options)


def test_linear_layers_of_enough_weights_have_products_and_others_are_dequantised(model):
    params, least = model.params, 32 * 96
    found = tree.flatten_paths(quantize.quantize(params, compute="int8", smallest=least))
    for path, leaf in tree.flatten_paths(quantize.quantize(params)).items():
        if path.endswith(".scale"):
            weight = found[path.removesuffix("scale") + "weight"]
            has_product = weight.ndim == 2 and weight.numel() >= least and ".modulation." not in path
            assert torch.equal(found[path.removesuffix("scale") + "int8_scale" if has_product else path], leaf)
        else:
            assert torch.equal(found[path], leaf)
    assert any(path.endswith(".int8_scale") for path in found) and any(path.endswith(".scale") for path in found)
    assert not quantize.has_products(quantize.quantize(params["transformer"], compute="int8"))  # Too small, all of it.


def test_a_network_computes_with_them_unchanged(model, stored):
    exact, dequantised = velocity(model.params, model), velocity(quantize.dequantize(stored), model)
    found = velocity(stored, model)
    of_weights, of_both = ((each - exact).norm() / exact.norm() for each in (dequantised, found))
    assert 1e-3 < of_weights < of_both < 0.05
    assert torch.equal(
        velocity(quantize.without_products(stored), model), velocity(quantize.quantize(model.params), model)
    )
    with torch.no_grad():
        same = velocity(stored, model, materialize=lambda part: tree.map(torch.clone, part))
    torch.testing.assert_close(same, found, rtol=1e-4, atol=1e-5)
    narrow = tree.cast(stored, torch.bfloat16)
    assert (velocity(narrow, model, torch.bfloat16).float() - exact).norm() / exact.norm() < 0.06


def test_a_lora_learns_beside_them_as_beside_the_dequantised_weights(model, stored):
    one = lora.init(prng.key(1), model.config, 2)
    one = tree.map_with_path(lambda path, leaf: leaf + 0.1 if path.endswith("up") else leaf, one)

    def slope(params):
        loss = lambda given: velocity(lora.apply(params, given, lazy=True), model).square().mean()  # noqa: E731
        return torch.cat([leaf.flatten() for leaf in tree.leaves(transform.value_and_grad(loss)(one)[0])])

    found, expected = slope(stored), slope(quantize.without_products(stored))
    assert (found - expected).norm() / expected.norm() < 0.1
    with pytest.raises(ValueError, match=r"is stored in torch.int8 with a scale: apply the LoRA with lazy=True"):
        lora.apply(stored, one)


def test_errors_of_products_are_those_of_the_layers_inputs(model, stored):
    params, seen = model.params["transformer"], []
    run = lambda leaves: seen.append(velocity({"transformer": leaves}, model))  # noqa: E731
    errors = product_errors(params, stored["transformer"], run)
    torch.testing.assert_close(seen[0], velocity(model.params, model), rtol=1e-4, atol=1e-5)
    names = {path for path in tree.flatten_paths(stored["transformer"]) if path.endswith(".int8_scale")}
    assert set(errors) == {path.removesuffix("int8_scale") + "weight" for path in names}
    assert all(1e-3 < error < 0.05 for error in errors.values())
    # One layer alone: half of its rows, as the last block's context has them, have errors of their own.
    layer = {"weight": prng.normal(prng.key(1), (24, 16)), "bias": prng.normal(prng.key(2), (24,))}
    x = prng.normal(prng.key(3), (5, 16))
    quantised = quantize.quantize({"blocks": [layer]}, compute="int8", smallest=0)
    whole = lambda tree: layers.linear(tree["blocks"][0], x)  # noqa: E731
    half = lambda tree: layers.linear(layers.split_outputs(tree["blocks"][0], (8, 16))[1], x)  # noqa: E731
    for run, rows in ((whole, slice(None)), (half, slice(8, None))):
        exact = (x @ layer["weight"].t())[:, rows]
        found = layers.linear(quantised["blocks"][0], x)[:, rows] - layer["bias"][rows]
        error = float((found - exact).norm() / exact.norm())
        assert product_errors({"blocks": [layer]}, quantised, run) == {
            "blocks.0.weight": pytest.approx(error, rel=1e-3)
        }


def test_products_are_taken_back_layer_by_layer(stored):
    path = "blocks.1.image.mlp.in.weight"
    before, after = (tree.flatten_paths(each) for each in (
        stored["transformer"], quantize.without_products(stored["transformer"], {path})
    ))  # fmt: skip
    assert set(before) ^ set(after) == {"blocks.1.image.mlp.in.scale", "blocks.1.image.mlp.in.int8_scale"}


@pytest.mark.parametrize("form", ["model.safetensors", "folder"])
def test_they_are_saved_and_loaded_as_they_are_or_as_floats(model, stored, tmp_path, form):
    weights.save(tmp_path / form, model._replace(params=stored), layout="native")
    kept = weights.load(tmp_path / form, quantized=True)
    assert not tree.diff(kept.params, stored) and quantize.has_products(kept.params)
    floats = weights.load(tmp_path / form, dtype=torch.float32)
    assert tree.allclose(floats.params, quantize.dequantize(stored), rtol=1e-6, atol=0)


def test_mistakes_are_named(model):
    for dtype, compute in ((torch.float8_e4m3fn, "int8"), (torch.int8, "int4")):
        with pytest.raises(ValueError, match=f"compute {compute!r} with dtype .* must be None, or that of the dtype"):
            quantize.quantize(model.params, dtype, compute=compute)
