"""Layers and blocks have every derivative: equal to torch.func's, differentiable again, mapped, with tangents."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from functional_sd3.core import layers, prng, transform, tree
from functional_sd3.core import spec as specs
from functional_sd3.transformer import joint_block

EPS = 1e-6


def drawn(*shape, seed, dtype=torch.float64):
    return prng.normal(prng.key(seed), shape, dtype=dtype)


# Name: (of the parameters and x, parameters).
LAYER = {"weight": drawn(4, 6, seed=1, dtype=torch.float32), "bias": drawn(4, seed=2, dtype=torch.float32)}
OUT = {"weight": drawn(6, 4, seed=3, dtype=torch.float32), "bias": drawn(6, seed=4, dtype=torch.float32)}
USED = {
    "linear": (layers.linear, LAYER),
    "mlp": (lambda params, x: layers.mlp(params, x, "gelu_tanh"), {"in": LAYER, "out": OUT}),
    "rms_norm": (lambda params, x: layers.rms_norm(params, x, EPS), {"weight": drawn(6, seed=5, dtype=torch.float32)}),
}


def block(params, x):
    """A joint block of x and its first tokens, modulated by itself."""
    modulation = {"image": x[:, 0].repeat(1, 6), "context": x[:, 1].repeat(1, 6)}
    streams = joint_block.apply(params, 2, {"image": x, "context": x[:, :2]}, modulation, "math")
    return torch.cat(list(streams.values()), dim=1)


SPEC = joint_block.spec(6, 3, qk_norm=True, dual=False, last=False)
BLOCK = specs.map_params(
    lambda path, param: 0.3 * drawn(*param.shape, seed=len(path), dtype=torch.float32),
    {stream: {name: part for name, part in parts.items() if name != "modulation"} for stream, parts in SPEC.items()},
)
USED["joint block"] = block, BLOCK
X = drawn(2, 5, 6, seed=7, dtype=torch.float32)


def learned(params):
    return tree.map(lambda leaf: leaf.requires_grad_(), params)


@pytest.mark.parametrize("name", USED)
def test_a_graph_of_its_own_changes_no_gradient_where_weights_are_used_twice(name):
    call, params = USED[name]
    params, x = learned(tree.cast(params, torch.float64)), X.double().requires_grad_()
    leaves = [*tree.leaves(params), x]
    once = call(params, x)
    once = once if once.shape == x.shape else once @ drawn(once.shape[-1], x.shape[-1], seed=3)
    twice = call(params, once).square().sum()
    plain = torch.autograd.grad(twice, leaves, retain_graph=True)
    graph = torch.autograd.grad(twice, leaves, create_graph=True)
    for one, other in zip(plain, graph, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", USED)
def test_inside_a_transform_layers_that_it_does_not_see_learn_too(name):
    call, params = USED[name]
    params, x = learned(tree.map(torch.clone, params)), X.clone().requires_grad_()
    expected = call(params, x)
    mapped = torch.func.vmap(lambda factor: factor * call(params, x))(torch.ones(2))
    torch.testing.assert_close(mapped[1], expected)
    _, tangent = torch.func.jvp(lambda factor: factor * call(params, x), (torch.ones(()),), (torch.ones(()),))
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("name", USED)
def test_a_backward_pass_may_be_mapped(name):
    call, params = USED[name]
    params, x = learned(tree.map(torch.clone, params)), X.clone().requires_grad_()
    value = call(params, x)
    leaves, gradients = [*tree.leaves(params), x], drawn(3, *value.shape, seed=9, dtype=torch.float32)
    actual = torch.autograd.grad(value, leaves, gradients, is_grads_batched=True, retain_graph=True)
    for index, gradient in enumerate(gradients):
        for one, other in zip(actual, torch.autograd.grad(value, leaves, gradient, retain_graph=True), strict=True):
            torch.testing.assert_close(one[index], other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["rms_norm", "mlp"])
def test_one_row_alone_learns(name):
    call, params = USED[name]
    params, x = learned(tree.map(torch.clone, params)), X[0, 0].clone().requires_grad_()
    call(params, x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_a_norm_of_another_dtype_than_its_input_learns():
    weight, x = torch.ones(6, requires_grad=True), X.double().requires_grad_()
    layers.rms_norm({"weight": weight}, x, EPS).sum().backward()
    assert weight.grad.dtype == torch.float32 and x.grad.dtype == torch.float64


@pytest.mark.parametrize("name", USED)
def test_a_layer_learns_as_it_does_under_torch_func(name):
    call, params = USED[name]
    target = drawn(1, seed=8, dtype=torch.float32)

    def loss(params, x):
        return (call(params, x) - target).square().mean()

    actual, value = transform.value_and_grad(loss, argnums=(0, 1))(params, X)
    expected, other = torch.func.grad_and_value(loss, argnums=(0, 1))(params, X)
    assert tree.allclose(actual, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value, other)
    rematerialised, _ = transform.value_and_grad(transform.remat(loss), argnums=(0, 1))(params, X)
    assert tree.allclose(rematerialised, actual, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("extra", ["low_rank", "scale"])
def test_an_mlp_with_something_beside_its_weights_is_not_computed_without_it(extra):
    beside = {"low_rank": {"down": drawn(2, 6, seed=3), "up": drawn(4, 2, seed=4)}, "scale": drawn(4, seed=5).abs()}
    first = {name: leaf.double() for name, leaf in LAYER.items()} | {extra: beside[extra]}
    params, x = {"in": first, "out": tree.cast(OUT, torch.float64)}, X.double().requires_grad_()
    expected = layers.linear(params["out"], F.gelu(layers.linear(first, x), approximate="tanh"))
    torch.testing.assert_close(layers.mlp(params, x, "gelu_tanh"), expected)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_an_mlp_is_its_layers_whatever_stands_between(activation):
    x = X.clone().requires_grad_()
    expected = layers.linear(OUT, layers.ACTIVATIONS[activation](layers.linear(LAYER, x)))
    torch.testing.assert_close(layers.mlp({"in": LAYER, "out": OUT}, x, activation), expected)


def of_projections(how):
    """A block of watched projections alone, and what it is without anybody watching."""
    weight = BLOCK["context"]["attention"]["qkv"]["weight"]
    weights = torch.stack([weight, 2 * weight])

    def run(weight):
        qkv = {**BLOCK["context"]["attention"]["qkv"], "weight": weight}
        attention = {**BLOCK["context"]["attention"], "qkv": qkv}
        return block({**BLOCK, "context": {**BLOCK["context"], "attention": attention}}, X)

    if how == "vmap":
        return torch.func.vmap(run)(weights), torch.stack([run(weight) for weight in weights])
    _, expected = torch.func.jvp(run, (weight,), (weights[1],))
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(weight, weights[1]))).tangent, expected


@pytest.mark.parametrize("how", ["vmap", "forward_ad"])
def test_projections_alone_may_be_mapped_and_have_tangents(how):
    torch.testing.assert_close(*of_projections(how), rtol=1e-5, atol=1e-5)


def test_streams_of_different_batches_are_an_error():
    with pytest.raises(RuntimeError, match="[Ss]ize"):
        modulation = {"image": X[:, 0].repeat(1, 6), "context": X[:1, 0].repeat(1, 6)}
        joint_block.apply(BLOCK, 2, {"image": X, "context": X[:1]}, modulation, "math")
