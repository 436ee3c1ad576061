"""Weights packed for one run: the same numbers, only where they pay, and never in what the caller holds."""

import pytest
import torch
import torch.nn.functional as F

from functional_sd3 import pipeline
from functional_sd3.core import cpu, layers, prng, transform, tree
from functional_sd3.flow import guidance, ode
from functional_sd3.pipeline import fields
from tests import models
from tests.operations import counted

THERE = torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")
needs_mkl = pytest.mark.skipif(not THERE, reason="this PyTorch has no MKL")


def drawn(*shape, seed=0):
    return prng.normal(prng.key(seed), shape)


def layer(bias=True):
    return {"weight": drawn(24, 16, seed=1)} | ({"bias": drawn(24, seed=2)} if bias else {})


@needs_mkl
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_packed_layer_is_the_layer_for_any_number_of_rows(bias):
    params = layer(bias)
    packed = cpu.packed(params, 20)
    assert "packed" not in params and packed["weight"] is params["weight"]
    for rows in (1, 10, 11, 300):
        x = drawn(2, rows, 16, seed=3)
        found, counts = counted(lambda x=x: layers.linear(packed, x))
        assert ("_mkl_linear" in counts) == (rows == 10)
        torch.testing.assert_close(found, F.linear(x, *params.values()), rtol=2e-5, atol=2e-6)
        hidden = layers.linear_activation(packed, x, "gelu_tanh")
        torch.testing.assert_close(hidden, F.gelu(found, approximate="tanh"), rtol=2e-5, atol=2e-6)
    first, second = layers.split_outputs(packed, (10, 14))
    torch.testing.assert_close(
        torch.cat([layers.linear(part, x) for part in (first, second)], dim=-1), found, rtol=2e-5, atol=2e-6
    )


@needs_mkl
def test_whoever_watches_is_given_the_layer_itself():
    params, x = cpu.packed(layer(), 5), drawn(5, 16, seed=3)
    gradient = torch.func.grad(lambda x: layers.linear(params, x).square().sum())(x)
    torch.testing.assert_close(gradient, 2 * layers.linear(layer(), x) @ params["weight"], rtol=1e-5, atol=1e-5)
    mapped = torch.func.vmap(lambda x: layers.linear(params, x[None]))(x)
    torch.testing.assert_close(mapped[:, 0], layers.linear(layer(), x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("extra", ["scale", "low_rank", "float64", "learned"])
def test_a_layer_that_is_more_than_its_float32_weight_is_left_alone(extra):
    params = layer()
    if extra == "float64":
        params = tree.cast(params, torch.float64)
    elif extra == "learned":
        params = tree.map(lambda leaf: leaf.requires_grad_(), params)
    else:
        params |= {"scale": drawn(24)} if extra == "scale" else {"low_rank": {"down": drawn(2, 16), "up": drawn(24, 2)}}
    assert cpu.packed(params, 5) is params


@pytest.fixture(scope="module")
def model():
    return models.random_model()


def sampled(model, **options):
    conditions = pipeline.encode(*models.parts(model), ["a red circle", "a blue star"])
    noise = pipeline.initial_noise(prng.key(2), model.config, 2)
    options = {"steps": 9, **options}
    latents, counts = counted(lambda: pipeline.sample(model.params, model.config, conditions, noise, **options))
    return latents, counts["_mkl_reorder_linear_weight"], counts["_mkl_linear"]


@needs_mkl
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance": guidance.interval(guidance.cfg(3.0), 0.0, 0.5), "steps": 18},
        {"guidance": guidance.skip_layer(guidance.cfg(3.0), (1,), 2.0, 0.0, 1.0)},
        {"method": ode.HEUN, "steps": 5},
    ],
    ids=["cfg", "cfg of an interval", "skipped layers", "heun"],
)
def test_a_run_with_packed_weights_is_the_run_without(model, options, monkeypatch):
    found, packings, products = sampled(model, **options)
    assert packings and products >= 4 * packings
    monkeypatch.setattr(fields, "PACKED_BYTES", 0)
    expected, packings, products = sampled(model, **options)
    assert not packings and not products
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not any("packed" in path for path in tree.flatten_paths(model.params))


@needs_mkl
def test_weights_are_packed_where_that_pays(model, monkeypatch):
    # Three products a stream and block, two more for the second attention; the last block's context asks nothing.
    assert sampled(model)[1] == 3 * 3 + 2 * 3 + 2
    assert not sampled(model, steps=fields.PACKED_STEPS - 1)[1]
    assert not sampled(model, block_transform=transform.remat)[1]
    assert not sampled(model, method=ode.BOSH3._replace(rtol=0.5, atol=0.5))[1]
    assert not sampled(model, pack=False)[1]
    weight = tree.nbytes(model.params["transformer"]["blocks"])
    monkeypatch.setattr(fields, "PACKED_BYTES", weight - 1)
    assert not sampled(model)[1]
    monkeypatch.setattr(fields, "PACKED_BYTES", weight)
    assert sampled(model)[1] == 3 * 3 + 2 * 3 + 2
    # A second network, or the same for batches of another size, has no room beside it.
    assert sampled(model, guidance=guidance.skip_layer(guidance.cfg(3.0), (1,), 2.0, 0.0, 1.0))[1] == 3 * 3 + 2 * 3 + 2


@needs_mkl
@pytest.mark.parametrize("offload", [False, True])
def test_who_offloads_wants_the_memory(model, offload):
    told = "a red circle", prng.key(0)
    _, counts = counted(lambda: pipeline.generate(*models.parts(model), *told, steps=8, offload=offload))
    assert ("_mkl_reorder_linear_weight" in counts) != offload
