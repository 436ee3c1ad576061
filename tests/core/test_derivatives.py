"""Backward passes by hand: equal to autograd's of the formula, differentiable again, and for eager autograd alone."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from functional_sd3.core import cpu, derivatives, layers, prng, transform, tree
from functional_sd3.core import spec as specs
from functional_sd3.transformer import joint_block

EPS = 1e-6


def drawn(*shape, seed, dtype=torch.float64):
    return prng.normal(prng.key(seed), shape, dtype=dtype)


def norm(x, weight):
    return derivatives.rms_norm(x, weight, EPS)


def norm_formula(x, weight):
    return derivatives.rms_norm_formula(x, weight, EPS)


def mlp_formula(x, weight, bias, out_weight, out_bias):
    return F.linear(F.gelu(F.linear(x, weight, bias), approximate="tanh"), out_weight, out_bias)


def both_streams(*given):
    return torch.cat(derivatives.joined_heads(given[:2], given[2:], 2, 4, EPS), dim=2)


def both_streams_formula(*given):
    return torch.cat(derivatives.joined_heads_formula(given[:2], given[2:], 2, 4, EPS), dim=2)


# Name: (by hand, the formula, shapes of the inputs).
FUNCTIONS = {
    "linear": (derivatives.linear, F.linear, [(5, 3), (4, 3), (4,)]),
    "mlp": (derivatives.mlp, mlp_formula, [(5, 3), (4, 3), (4,), (2, 4), (2,)]),
    "rms_norm": (norm, norm_formula, [(2, 3, 4), (4,)]),
    "joined heads": (both_streams, both_streams_formula, [(2, 3, 12), (2, 2, 12), (2,), (2,), (2,), (2,)]),
    "joined heads, one of whom asks": (both_streams, both_streams_formula, [(2, 3, 12), (2, 1, 8), (2,), (2,), (2,)]),
    "joined heads without norms": (both_streams, both_streams_formula, [(2, 3, 12), (2, 2, 12)]),
    "gate": (derivatives.add_product, torch.addcmul, [(2, 3, 4), (2, 1, 4), (2, 3, 4)]),
    "modulate": (derivatives.add_product, torch.addcmul, [(2, 1, 4), (2, 3, 4), (2, 1, 4)]),
    "gate of one for all": (derivatives.add_product, torch.addcmul, [(2, 3, 4), (1, 1, 4), (2, 3, 4)]),
}


def inputs_of(name, dtype=torch.float64):
    return [drawn(*shape, seed=index, dtype=dtype) for index, shape in enumerate(FUNCTIONS[name][2])]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_first_and_second_derivatives_are_right(name):
    by_hand, _, _ = FUNCTIONS[name]
    inputs = [leaf.requires_grad_() for leaf in inputs_of(name)]
    assert torch.autograd.gradcheck(by_hand, inputs)
    assert torch.autograd.gradgradcheck(by_hand, inputs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_whatever_is_differentiated_alone_is_as_the_formula_says(name):
    by_hand, formula, shapes = FUNCTIONS[name]
    for chosen in range(1, 2 ** len(shapes)):
        found = []
        for fn in (by_hand, formula):
            inputs = [leaf.requires_grad_(bool(chosen >> index & 1)) for index, leaf in enumerate(inputs_of(name))]
            value = fn(*inputs)
            gradient = drawn(*value.shape, seed=9)
            needed = [leaf for leaf in inputs if leaf.requires_grad]
            found.append([value, *torch.autograd.grad(value, needed, gradient)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_backward_pass_can_be_run_twice(name):
    by_hand, _, _ = FUNCTIONS[name]
    inputs = [leaf.requires_grad_() for leaf in inputs_of(name)]
    value = by_hand(*inputs)
    gradient = drawn(*value.shape, seed=9)
    kept = gradient.clone()
    first = torch.autograd.grad(value, inputs, gradient, retain_graph=True)
    second = torch.autograd.grad(value, inputs, gradient)
    assert all(map(torch.equal, first, second)) and torch.equal(gradient, kept)


# What layers ask for: (of the parameters and x, the function that is then called).
LAYER = {"weight": drawn(4, 6, seed=1, dtype=torch.float32), "bias": drawn(4, seed=2, dtype=torch.float32)}
OUT = {"weight": drawn(6, 4, seed=3, dtype=torch.float32), "bias": drawn(6, seed=4, dtype=torch.float32)}
USED = {
    "linear": (layers.linear, LAYER),
    "mlp": (lambda params, x: layers.mlp(params, x, "gelu_tanh"), {"in": LAYER, "out": OUT}),
    "rms_norm": (lambda params, x: layers.rms_norm(params, x, EPS), {"weight": drawn(6, seed=5, dtype=torch.float32)}),
    "add_product": (
        lambda params, x: layers.add_product(x, params["gate"], x),
        {"gate": drawn(2, 1, 6, seed=6, dtype=torch.float32)},
    ),
}


def block(params, x):
    """A joint block of x and its first tokens, modulated by itself."""
    modulation = {"image": x[:, 0].repeat(1, 6), "context": x[:, 1].repeat(1, 6)}
    return torch.cat(joint_block.apply(params, 2, x, x[:, :2], modulation, "math"), dim=1)


SPEC = joint_block.spec(6, 3, qk_norm=True, dual=False, last=False)
BLOCK = specs.map_params(
    lambda path, param: 0.3 * drawn(*param.shape, seed=len(path), dtype=torch.float32),
    {stream: {name: part for name, part in parts.items() if name != "modulation"} for stream, parts in SPEC.items()},
)
USED["joined_heads"] = block, BLOCK
X = drawn(2, 5, 6, seed=7, dtype=torch.float32)


class Special(torch.Tensor):
    pass


def learned(params):
    return tree.map(lambda leaf: leaf.requires_grad_(), params)


def dual(call, params, x):
    params = learned(params)
    with forward_ad.dual_level():
        return call(params, forward_ad.make_dual(x, torch.ones_like(x)))


def second_order(call, params, x):
    return torch.func.grad(lambda x: torch.func.grad(lambda x: call(params, x).square().sum())(x).square().sum())(x)


def autocast(call, params, x):
    with torch.autocast("cpu", torch.bfloat16):
        return call(learned(params), x).float().sum().backward()


WATCHERS = {
    "nothing": lambda call, params, x: call(params, x),
    "torch.func.grad": lambda call, params, x: torch.func.grad(lambda x: call(params, x).square().sum())(x),
    "torch.func.grad twice": second_order,
    "vmap": lambda call, params, x: torch.func.vmap(lambda x: call(params, x[None]))(x),
    "torch.func.jvp": lambda call, params, x: torch.func.jvp(lambda x: call(params, x), (x,), (x,)),
    "forward_ad": dual,
    "autocast": autocast,
    "no_grad": lambda call, params, x: torch.no_grad()(call)(learned(params), x),
    "a tensor subclass": lambda call, params, x: call(params, x.as_subclass(Special).requires_grad_()),
    "bfloat16": lambda call, params, x: call(tree.cast(params, torch.bfloat16), x.bfloat16().requires_grad_()),
}


@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize("name", USED)
def test_others_than_eager_autograd_are_given_the_formula(name, watcher, monkeypatch):
    call, params = USED[name]
    params, called = tree.map(torch.clone, params), []
    meant = getattr(derivatives, name)
    monkeypatch.setattr(derivatives, name, lambda *inputs: called.append(name) or meant(*inputs))
    WATCHERS[watcher](call, params, X.clone())
    assert not called
    call(learned(params), X.clone().requires_grad_())
    assert called
    # What is frozen keeps nothing for a backward pass.
    called.clear()
    call(tree.map(torch.clone, USED[name][1]), X.clone().requires_grad_())
    call(params, X.clone())
    assert not called


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
    found = torch.autograd.grad(value, leaves, gradients, is_grads_batched=True, retain_graph=True)
    for index, gradient in enumerate(gradients):
        for one, other in zip(found, torch.autograd.grad(value, leaves, gradient, retain_graph=True), strict=True):
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


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize(
    "call",
    [
        layers.linear,
        lambda params, x: layers.linear(cpu.packed(params, 20), x),
        *(lambda params, x, name=name: layers.linear_activation(params, x, name) for name in layers.ACTIVATIONS),
    ],
    ids=["linear", "packed", *layers.ACTIVATIONS],
)
def test_no_layer_loses_the_tangent_of_a_dual_number(call, rows):
    # What is faster on a CPU has no forward-mode derivative, and would say nothing of it.
    x, tangent = (drawn(rows, 6, seed=seed, dtype=torch.float32) for seed in (7, 8))
    _, expected = torch.func.jvp(lambda x: call(LAYER, x), (x,), (tangent,))
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(call(LAYER, forward_ad.make_dual(x, tangent))).tangent
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", USED)
def test_a_layer_learns_as_it_does_under_torch_func(name):
    call, params = USED[name]
    target = drawn(1, seed=8, dtype=torch.float32)

    def loss(params, x):
        return (call(params, x) - target).square().mean()

    found, value = transform.value_and_grad(loss, argnums=(0, 1))(params, X)
    expected, other = torch.func.grad_and_value(loss, argnums=(0, 1))(params, X)
    assert tree.allclose(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value, other)
    rematerialised, _ = transform.value_and_grad(transform.remat(loss), argnums=(0, 1))(params, X)
    assert tree.allclose(rematerialised, found, rtol=1e-5, atol=1e-6)


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
    expected = layers.linear(OUT, layers.ACTIVATIONS[activation].over(layers.linear(LAYER, x)))
    torch.testing.assert_close(layers.mlp({"in": LAYER, "out": OUT}, x, activation), expected)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("shape", [(1 << 16, 1), (300, 250), (3, 257, 96), (2, 5, 6554)])
def test_one_dnn_has_the_same_gelu(shape):
    x = 4 * drawn(*shape, seed=1, dtype=torch.float32)
    # Where the tail of the normal distribution is below float32's smallest number, and beyond.
    x.view(-1)[:5] = torch.tensor([-30.0, 30.0, 0.0, -1e20, 1e20])
    if not cpu.has_gelu_tanh(x):
        pytest.skip("this PyTorch has no oneDNN")
    found, expected = cpu.gelu_tanh(x), F.gelu(x.double(), approximate="tanh").float()
    assert found.shape == x.shape and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not cpu.has_gelu_tanh(x)
    assert not cpu.has_gelu_tanh(x.double()) and not cpu.has_gelu_tanh(x.view(-1)[:100].view(1, 100))


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


def test_under_autocast_norms_are_those_of_the_formula(monkeypatch):
    for name in ("joined", "normed"):
        monkeypatch.setattr(derivatives, name, None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = block(BLOCK, X)
    monkeypatch.undo()
    assert (found - block(BLOCK, X)).norm() < 0.02 * found.norm()


def test_streams_of_different_batches_are_an_error():
    with pytest.raises(RuntimeError, match="[Ss]ize"):
        modulation = {"image": X[:, 0].repeat(1, 6), "context": X[:1, 0].repeat(1, 6)}
        joint_block.apply(BLOCK, 2, X, X[:1], modulation, "math")


@pytest.mark.parametrize("rows", [1, 5000, 100_000])
def test_sums_over_many_rows_keep_their_digits(rows):
    x, weight = drawn(rows, 2, seed=1).abs() + 1, torch.ones(2, dtype=torch.float64)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        inputs = [weight.to(dtype).requires_grad_(), torch.zeros(2, dtype=dtype, requires_grad=True)]
        wide = x.to(dtype).requires_grad_()
        normed = derivatives.rms_norm(wide, inputs[0], EPS)
        shifted = derivatives.linear(wide, torch.eye(2, dtype=dtype).requires_grad_(), inputs[1])
        gradients.append(torch.cat(torch.autograd.grad((normed + shifted).sum(), inputs)))
    torch.testing.assert_close(gradients[1].double(), gradients[0], rtol=1e-6, atol=0)
