"""Layers that take a shorter way where nothing watches compute what the long way does."""

import pytest
import torch
import torch.nn.functional as F

from functional_sd3.core import layers, prng


def drawn(*shape, seed=0):
    return prng.normal(prng.key(seed), shape)


@pytest.mark.parametrize("shape", [(5, 16), (2, 7, 16), (2, 3, 4, 16), (0, 16), (16,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_fused_hidden_layer_is_the_product_and_then_its_gelu(shape, bias):
    params = {"weight": drawn(24, 16, seed=1)} | ({"bias": drawn(24, seed=2)} if bias else {})
    x = drawn(*shape)
    expected = F.gelu(F.linear(x, params["weight"], params.get("bias")), approximate="tanh")
    torch.testing.assert_close(layers.linear_gelu_tanh(params, x), expected, rtol=2e-5, atol=2e-6)


def test_a_hidden_layer_has_its_derivatives_and_leaves_its_input_alone():
    params = {"weight": drawn(24, 16, seed=1), "bias": drawn(24, seed=2)}
    x = drawn(5, 16)
    before = x.clone()

    def total(params):
        return layers.linear_gelu_tanh(params, x).square().sum()

    def plainly(params):
        return F.gelu(F.linear(x, params["weight"], params["bias"]), approximate="tanh").square().sum()

    found, expected = torch.func.grad(total)(params), torch.func.grad(plainly)(params)
    for name in params:
        torch.testing.assert_close(found[name], expected[name])
    assert torch.equal(x, before)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    total(leaves).backward()
    torch.testing.assert_close(leaves["weight"].grad, expected["weight"])


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_a_hidden_layer_is_fused_where_one_dnn_is_enabled_and_never_else():
    from torch.utils._python_dispatch import TorchDispatchMode

    names = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    params, x = {"weight": drawn(24, 16, seed=1), "bias": drawn(24, seed=2)}, drawn(5, 16)
    with Watch():
        layers.linear_gelu_tanh(params, x)
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    assert ("_linear_pointwise" in names) == there
    names.clear()
    with torch.backends.mkldnn.flags(enabled=False), Watch():
        layers.linear_gelu_tanh(params, x)
    assert "_linear_pointwise" not in names and "addmm" in names


@pytest.mark.parametrize("extra", ["low_rank", "scale"])
def test_a_hidden_layer_with_something_beside_its_weight_is_not_computed_without_it(extra):
    params = {"weight": drawn(24, 16, seed=1), "bias": drawn(24, seed=2)}
    beside = {"low_rank": {"down": drawn(2, 16, seed=3), "up": drawn(24, 2, seed=4)}, "scale": drawn(24, seed=5).abs()}
    params |= {extra: beside[extra]}
    x = drawn(3, 5, 16)
    expected = F.gelu(layers.linear(params, x), approximate="tanh")
    torch.testing.assert_close(layers.linear_gelu_tanh(params, x), expected)


def test_quick_gelu_in_place_is_quick_gelu():
    x = drawn(7, 11)
    torch.testing.assert_close(layers.quick_gelu_over(x.clone()), layers.quick_gelu(x))


def test_the_outputs_of_a_layer_in_parts_are_its_outputs():
    params = {"weight": drawn(24, 16, seed=1), "bias": drawn(24, seed=2), "scale": drawn(24, seed=5)}
    params["low_rank"] = {"down": drawn(2, 16, seed=3), "up": drawn(24, 2, seed=4)}
    x = drawn(3, 16)
    parts = [layers.linear(part, x) for part in layers.split_outputs(params, (5, 4, 15))]
    torch.testing.assert_close(torch.cat(parts, -1), layers.linear(params, x))
