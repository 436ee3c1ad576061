"""Gradients by both paths, rematerialisation, per-sample gradients, Hessians and compilation."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, grad_and_value, jacrev, jvp, vmap

from functional_sd3.core import layers, prng, transform, tree

WIDTH, DEPTH, BATCH = 6, 4, 5


@pytest.fixture(autouse=True)
def slow_vmap_loops_are_errors():
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


@pytest.fixture
def params():
    keys = prng.split(prng.key(0), DEPTH)
    blocks = [{"weight": prng.normal(key, (WIDTH, WIDTH)) / 2, "bias": torch.full((WIDTH,), 0.1)} for key in keys]
    return {"blocks": blocks, "unused": torch.ones(3)}


@pytest.fixture
def x():
    return prng.normal(prng.key(1), (BATCH, WIDTH))


def block(params, x):
    return x + torch.tanh(layers.linear(params, torch.sin(x)))


def network(block, params, x):
    for one in params["blocks"]:
        x = block(one, x)
    return x


def loss(params, x):
    return network(block, params, x).square().mean()


def remat_loss(params, x):
    return network(transform.remat(block), params, x).square().mean()


def close(first, second):
    return not tree.diff(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fn", [loss, remat_loss])
def test_both_gradient_paths_are_equal(fn, params, x):
    grads, value = transform.value_and_grad(fn)(params, x)
    expected, expected_value = grad_and_value(loss)(params, x)
    assert close(grads, expected) and torch.equal(value, expected_value)
    assert grads["blocks"][0]["weight"].abs().max() > 0
    assert not any(leaf.requires_grad for leaf in [value, *tree.leaves(grads)])


def test_leaves_the_loss_does_not_use_have_zero_gradients(params, x):
    grads, _ = transform.value_and_grad(loss)(params, x)
    assert torch.equal(grads["unused"], torch.zeros(3))
    grads, value = transform.value_and_grad(lambda params: torch.tensor(2.0))(params)
    assert value == 2 and not any(leaf.any() for leaf in tree.leaves(grads))


def test_argnums_and_auxiliary_results_are_those_of_torch_func(params, x):
    def fn(params, x, *, scale):
        y = network(block, params, x)
        return scale * y.square().mean(), {"y": y}

    for argnums in (0, 1, (1, 0), (1,), -1):
        ours = transform.value_and_grad(fn, argnums, has_aux=True)(params, x, scale=3.0)
        theirs = grad_and_value(fn, argnums, has_aux=True)(params, x, scale=3.0)
        assert type(ours[0]) is type(theirs[0])
        assert close(ours[0], theirs[0]) and torch.equal(ours[1][0], theirs[1][0])
        assert torch.equal(ours[1][1]["y"], theirs[1][1]["y"]) and not ours[1][1]["y"].requires_grad


@pytest.mark.parametrize("fn", [loss, remat_loss])
def test_gradients_under_other_transforms_equal_those_of_torch_func(fn, params, x):
    ours, theirs = transform.value_and_grad(fn), grad_and_value(loss)
    tangents = tree.map(torch.cos, params)

    def norm(of):
        return lambda params, x: sum(leaf.square().sum() for leaf in tree.leaves(of(params, x)[0]))

    assert close(vmap(ours, in_dims=(None, 0))(params, x)[0], vmap(theirs, in_dims=(None, 0))(params, x)[0])
    assert close(grad(norm(ours))(params, x), grad(norm(theirs))(params, x))
    assert close(transform.value_and_grad(norm(ours))(params, x)[0], grad(norm(theirs))(params, x))
    for mine, other in zip(
        jvp(lambda params: ours(params, x), (params,), (tangents,)),
        jvp(lambda params: theirs(params, x), (params,), (tangents,)),
        strict=True,
    ):
        assert close(mine[0], other[0]) and torch.allclose(mine[1], other[1])


def test_a_gradient_inside_a_differentiated_function_is_differentiated_through_its_closure():
    def after_one_step(rate, weight):
        inner, _ = transform.value_and_grad(lambda weight: rate * weight**3)(weight)
        return weight - inner

    weight = torch.tensor(2.0)
    grads, value = transform.value_and_grad(lambda rate: after_one_step(rate, weight))(torch.tensor(0.5))
    assert (value, grads) == (2 - 0.5 * 3 * 4, -3 * 4)
    rate = torch.tensor(0.5, requires_grad=True)
    inner, value = transform.value_and_grad(lambda rate: rate**3)(rate)
    assert math.isclose(torch.autograd.grad(inner + value, rate)[0], 6 * 0.5 + 3 * 0.25)


def test_gradients_are_taken_under_no_grad_and_of_leaves_that_require_it(params, x):
    expected = grad(loss)(params, x)
    with torch.no_grad():
        assert close(transform.value_and_grad(loss)(params, x)[0], expected)
    learned = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    assert close(tree.map(torch.detach, transform.value_and_grad(loss)(learned, x)[0]), expected)
    assert all(leaf.grad is None for leaf in tree.leaves(learned))


def test_gradients_of_tied_leaves_are_separate_and_inputs_stay_as_they_were(params, x):
    tied = {"blocks": [params["blocks"][0]] * 2}
    before = tree.map(torch.clone, tied)
    grads, _ = transform.value_and_grad(loss)(tied, x)
    assert close(grads, grad(loss)(tied, x))
    assert not torch.equal(grads["blocks"][0]["weight"], grads["blocks"][1]["weight"])
    assert not tree.diff(tied, before)
    assert not any(leaf.requires_grad for leaf in tree.leaves(tied))


@pytest.mark.parametrize(
    "fn, argument, message",
    [
        (lambda params: params["w"].sum(), {"w": torch.ones(2), "ids": torch.arange(3)}, "ids is torch.int64"),
        (lambda params: params["w"].sum(), {"w": torch.ones(2), "rate": 0.1}, "rate is float"),
        (lambda params: params["w"], {"w": torch.ones(2)}, r"returned torch.float32 \(2,\); only a scalar"),
        (lambda params: 1.0, {"w": torch.ones(2)}, "returned float; only a scalar"),
    ],
)
def test_arguments_without_gradient_are_named(fn, argument, message):
    with pytest.raises(ValueError, match=message):
        transform.value_and_grad(fn)(argument)


@pytest.mark.parametrize("fn", [loss, remat_loss])
def test_a_gradient_of_a_mapped_or_tangent_computation_equals_that_of_torch_func(fn, params, x):
    def mapped(params, loss):
        return vmap(loss, in_dims=(None, 0))(params, x).square().mean()

    def tangent(params, loss):
        return jvp(lambda x: loss(params, x), (x,), (torch.cos(x),))[1]

    for of in (mapped, tangent):
        ours = transform.value_and_grad(lambda params, of=of: of(params, fn))(params)[0]
        assert close(ours, grad(lambda params, of=of: of(params, loss))(params))


def kept_bytes(fn, params, x):
    """Bytes autograd keeps for the backward pass of `fn`, parameters aside."""
    params = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    known, kept = {leaf.untyped_storage().data_ptr() for leaf in tree.leaves(params)}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = fn(params, x)
    assert value.requires_grad
    return sum(size for address, size in kept.items() if address not in known)


def test_remat_keeps_one_activation_a_block(params, x):
    x = prng.normal(prng.key(2), (500, WIDTH))
    activation = x.numel() * x.element_size()
    assert kept_bytes(remat_loss, params, x) <= (DEPTH + 2) * activation
    assert kept_bytes(loss, params, x) >= 3 * DEPTH * activation


def test_remat_runs_a_block_twice_for_a_gradient_and_once_without(params, x):
    runs = []

    def counted(params, x):
        runs.append(1)
        return block(params, x)

    def fn(params, x, *, shift):
        return transform.remat(lambda params, x, *, shift: counted(params, x + shift))(params, x, shift=shift).sum()

    one = params["blocks"][0]
    grads, _ = transform.value_and_grad(fn)(one, x, shift=0.5)
    assert len(runs) == 2 and close(grads, grad(lambda params: block(params, x + 0.5).sum())(one))
    fn(one, x, shift=0.5)
    assert len(runs) == 3


def test_per_sample_grads_equal_a_loop_over_samples(params, x):
    batch = {"x": x, "target": torch.flip(x, (0,))}

    def sample_loss(params, sample, weight):
        return weight * (network(block, params, sample["x"]) - sample["target"]).square().mean()

    weights = torch.linspace(0, 1, BATCH)
    loop = [
        grad(sample_loss)(params, tree.map(lambda leaf, i=index: leaf[i], batch), weights[index])
        for index in range(BATCH)
    ]
    expected = tree.map(lambda *leaves: torch.stack(leaves), *loop)
    assert close(transform.per_sample_grads(sample_loss)(params, batch, weights), expected)
    assert close(transform.per_sample_grads(sample_loss, chunk_size=2)(params, batch, weights), expected)


def test_hvp_equals_the_dense_hessian_times_the_vector(params, x):
    params = tree.cast({"blocks": params["blocks"][:1], "unused": params["unused"]}, torch.float64)
    tangents = tree.map_with_path(lambda path, leaf: prng.normal(prng.key(len(path)), leaf.shape, leaf.dtype), params)
    sizes = [leaf.numel() for leaf in tree.leaves(params)]

    def flat_loss(flat):
        parts = iter(flat.split(sizes))
        return loss(tree.map(lambda leaf: next(parts).reshape(leaf.shape), params), x.double())

    flat, direction = (torch.cat([leaf.flatten() for leaf in tree.leaves(some)]) for some in (params, tangents))
    expected = jacrev(jacrev(flat_loss))(flat) @ direction
    for fn in (loss, remat_loss):
        product = transform.hvp(lambda params, fn=fn: fn(params, x.double()), params, tangents)
        assert list(tree.flatten_paths(product)) == list(tree.flatten_paths(params))
        torch.testing.assert_close(torch.cat([leaf.flatten() for leaf in tree.leaves(product)]), expected)


def test_a_compiled_gradient_is_one_graph_equal_to_eager(params, x):
    backend = "inductor" if transform.compiler_available() else "aot_eager"
    counter = CompileCounterWithBackend(backend)
    expected = grad_and_value(loss)(params, x)
    assert close(transform.compile(transform.value_and_grad(remat_loss), backend=counter)(params, x)[0], expected[0])
    assert counter.frame_count == 1


def test_compile_takes_the_whole_function_or_fails():
    def printing(x):
        print("a side effect")
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        transform.compile(printing, backend="eager")(torch.ones(2))


def test_compile_names_the_missing_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not transform.compiler_available()
    with pytest.raises(RuntimeError, match="needs the C.. compiler no-such-compiler and Python's headers"):
        transform.compile(torch.sin)
    assert transform.compile(torch.sin, backend="eager")(torch.zeros(1)) == 0


def test_tangents_and_losses_of_another_form_are_named():
    params = {"a": torch.ones(2), "b": [torch.ones(3)]}
    total = lambda params: params["a"].sum() ** 2  # noqa: E731
    with pytest.raises(ValueError, match="the tangent b.0 has shape"):
        transform.hvp(total, params, {"a": torch.ones(2), "b": [torch.ones(1)]})
    with pytest.raises(ValueError, match="trees differ at the root"):
        transform.hvp(total, params, {"a": torch.ones(2)})
    with pytest.raises(ValueError, match=r"the function returned torch.float32 \(3,\)"):
        transform.per_sample_grads(lambda params, x: params * x)(torch.ones(3), torch.ones(4, 3))
