"""Products of int8: what they compute, their derivatives, and where they are not computed."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

from functional_sd3.core import dispatch, layers, prng, transform
from functional_sd3.kernels import int8, int8_functions
from tests import choices

pytestmark = pytest.mark.skipif(int8_functions.product() is None, reason="needs products of int8 that are right")

INT_MM = "aten::_int_mm"
X = prng.normal(prng.key(0), (2, 9, 16))
LAYER = {
    "weight": (40 * prng.normal(prng.key(1), (24, 16))).clamp(-127, 127).to(torch.int8),
    "int8_scale": prng.uniform(prng.key(2), (24,)) / 100 + 0.01,
    "bias": prng.normal(prng.key(3), (24,)),
}
WEIGHT = LAYER["weight"] * LAYER["int8_scale"][:, None]


@pytest.fixture(autouse=True)
def products_of_any_size(monkeypatch):
    choices.use(monkeypatch)


def operations(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        result = run()
    return result, {event.key for event in profiler.key_averages()}


def loss(x):
    return (layers.linear(LAYER, x) ** 3).mean()


@given(st.integers(0, 2**31), st.floats(-20, 20))
@settings(max_examples=25)
def test_rows_are_rounded_to_255_levels_of_their_own(seed, magnitude):
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(seed)) * 10.0**magnitude
    x[3] = 0
    largest = x.abs().amax(-1, keepdim=True)
    rounded = layers.round_rows(x)
    assert ((rounded - x).abs() <= largest / 254 * (1 + 1e-5)).all() and not rounded[3].any()
    numbers, steps = int8_functions.round_to_int8(x)
    torch.testing.assert_close(numbers * steps, rounded, rtol=1e-6, atol=0)
    assert numbers.abs().amax(-1).tolist() == [127, 127, 127, 0, 127, 127, 127]


def test_the_product_is_that_of_the_integers():
    rows = X.flatten(0, 1)
    steps = rows.abs().amax(1, keepdim=True) / 127
    exact = (rows / steps).round().double() @ LAYER["weight"].double().t() * steps * LAYER["int8_scale"] + LAYER["bias"]
    found, seen = operations(lambda: layers.linear(LAYER, X))
    torch.testing.assert_close(found.flatten(0, 1).double(), exact.double(), rtol=1e-5, atol=1e-5)
    assert INT_MM in seen
    narrow = layers.linear({**LAYER, "bias": LAYER["bias"].bfloat16()}, X.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), found, rtol=0.03, atol=0.03)


def test_derivatives_are_those_of_the_dequantised_weight():
    """As if nothing were rounded but the value: what a LoRA beside such a weight learns from."""
    y, g = layers.linear(LAYER, X), prng.normal(prng.key(4), (2, 9, 24))
    through = lambda x: (layers.linear(LAYER, x) * g).sum()  # noqa: E731
    expected = g @ WEIGHT
    leaf = X.clone().requires_grad_()
    (by_autograd,), seen = operations(lambda: torch.autograd.grad(through(leaf), leaf))
    assert INT_MM in seen
    for found in (by_autograd, grad(through)(X), vmap(grad(lambda x, g: (layers.linear(LAYER, x) * g).sum()))(X, g)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    value, tangent = jvp(lambda x: layers.linear(LAYER, x), (X,), (X.flip(0),))
    torch.testing.assert_close(value, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tangent, X.flip(0) @ WEIGHT.t(), rtol=1e-5, atol=1e-5)
    with dispatch.plain():
        second, formula = (jvp(grad(loss), (X,), (X.flip(0),))[1] for _ in range(2))
    torch.testing.assert_close(jvp(grad(loss), (X,), (X.flip(0),))[1], second, rtol=1e-4, atol=1e-5)
    assert torch.equal(second, formula)


def test_several_weights_are_mapped():
    two = {name: torch.stack([leaf, leaf.flip(0)]) for name, leaf in LAYER.items()}
    found = vmap(layers.linear, (0, None))(two, X)
    for index in range(2):
        one = {name: leaf[index] for name, leaf in two.items()}
        torch.testing.assert_close(found[index], layers.linear(one, X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("differentiated", [False, True], ids=["value", "gradient"])
def test_a_compiled_layer_has_the_product_in_one_graph(differentiated):
    torch._dynamo.reset()
    function = grad(loss) if differentiated else loss
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        x = X[:1].expand(batch, -1, -1).contiguous()
        found, seen = operations(lambda x=x: compiled(x))
        torch.testing.assert_close(found, function(x), rtol=1e-5, atol=1e-6)
        assert INT_MM in seen


def test_a_weight_is_recomputed_under_rematerialisation():
    block = lambda x: layers.linear(LAYER, x).tanh()  # noqa: E731
    run = lambda apply: transform.value_and_grad(lambda x: apply(x).sum())(X)  # noqa: E731
    for one, other in zip(run(transform.remat(block)), run(block), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["no instructions", "small", "switched off", "float64", "a scale that learns"])
def test_other_layers_are_their_formula(change, monkeypatch):
    params, x = dict(LAYER), X
    monkeypatch.setattr(int8, "LEAST_SIZE", {"no instructions": None, "small": 24 * 16 + 1}.get(change, 0))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", change != "switched off")
    if change == "float64":
        params, x = params | {"bias": params["bias"].double()}, x.double()
    if change == "a scale that learns":
        params["int8_scale"] = params["int8_scale"].clone().requires_grad_()
    found, seen = operations(lambda: layers.linear(params, x))
    torch.testing.assert_close(found, F.linear(layers.round_rows(x), WEIGHT.to(x.dtype), params["bias"]))
    assert INT_MM not in seen


def test_a_value_that_is_not_finite_stays_one():
    for value in (float("nan"), float("inf")):
        x = X.clone()
        x[0, 3, 5] = value
        for run in (layers.linear, layers.linear.formula):
            finite = torch.isfinite(run(LAYER, x)).all(-1)
            assert not finite[0, 3] and finite.sum() == finite.numel() - 1
