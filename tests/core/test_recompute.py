"""Rematerialised functions have the derivatives of the plain ones, of every kind and order, and save no activations."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jvp, vmap

from bench.timing import allocated_peak
from functional_sd3.core import closures, prng, transform, tree
from functional_sd3.flow import ode
from functional_sd3.flow.analysis import adjoint

WIDTH, DEPTH = 4, 3


def random(seed, *shape):
    return prng.normal(prng.key(seed), shape, torch.float64)


PARAMS = [{"weight": random(seed, WIDTH, WIDTH), "bias": random(10 + seed, WIDTH)} for seed in range(DEPTH)]
TANGENTS = tree.map(torch.cos, PARAMS)
X = random(20, 5, WIDTH)


class Result(NamedTuple):
    y: torch.Tensor
    same: torch.Tensor
    factor: float


def network(params, x, remat, factor=1.5):
    """Blocks that read a tensor from their closure, and return one of their inputs unchanged."""
    shift = x.mean()

    def block(params, x, *, factor):
        y = torch.tanh(x @ params["weight"] + params["bias"]) * factor + shift
        return Result(y, x, factor)

    for layer in params:
        result = (transform.remat(block) if remat else block)(layer, x, factor=factor)
        assert result.factor == factor
        x = result.y + result.same
    return x


def loss(params, x, remat):
    return network(params, x, remat).square().mean()


def squares(grads):
    return sum(leaf.square().sum() for leaf in tree.leaves(grads))


COMPOSITIONS = {
    "grad": lambda f: grad(f)(PARAMS, X),
    "value_and_grad": lambda f: transform.value_and_grad(f)(PARAMS, X),
    "vmap(grad)": lambda f: transform.per_sample_grads(lambda params, x: f(params, x[None]))(PARAMS, X),
    "jvp": lambda f: jvp(lambda params: f(params, X), (PARAMS,), (TANGENTS,)),
    "hvp": lambda f: transform.hvp(lambda params: f(params, X), PARAMS, TANGENTS),
    "grad(grad)": lambda f: grad(lambda params: squares(grad(f)(params, X)))(PARAMS),
    "grad(hvp)": lambda f: grad(lambda x: squares(transform.hvp(lambda p: f(p, x), PARAMS, TANGENTS)))(X),
    "jacfwd": lambda f: jacfwd(lambda x: f(PARAMS, x))(X),
    "hessian": lambda f: hessian(lambda x: f(PARAMS, x))(X),
    "grad(vmap)": lambda f: grad(lambda params: vmap(partial(f, params))(X[:, None]).square().sum())(PARAMS),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_derivatives_equal_those_of_the_plain_function(name):
    ours, plain = (COMPOSITIONS[name](partial(loss, remat=remat)) for remat in (True, False))
    for first, second in zip(tree.leaves(ours), tree.leaves(plain), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["grad", "vmap(grad)", "hvp", "grad(grad)"])
def test_no_activations_are_saved(name):
    def loss(params, x, remat):
        def block(weight, x):
            for _ in range(10):
                x = torch.sin(x) * weight
            return x

        for weight in params:
            x = (transform.remat(block) if remat else block)(weight, x)
        return x.square().mean()

    params, x = [torch.ones(()), torch.ones(()), torch.ones(()), torch.ones(())], torch.ones(8, 1000)
    derivative = {
        "grad": lambda f: grad(f)(params, x),
        "vmap(grad)": lambda f: transform.per_sample_grads(f)(params, x),
        "hvp": lambda f: transform.hvp(lambda params: f(params, x), params, params),
        "grad(grad)": lambda f: grad(lambda params: squares(grad(f)(params, x)))(params),
    }[name]
    ours, plain = (
        allocated_peak(lambda remat=remat: derivative(partial(loss, remat=remat))) for remat in (True, False)
    )
    assert ours <= 0.6 * plain


def test_a_checkpointed_sampler_has_the_gradient_of_what_its_velocity_closes_over():
    times = torch.linspace(1.0, 0.0, 4, dtype=torch.float64)

    def end(scale, method):
        return ode.integrate(method, lambda x, t: torch.tanh(scale * x) * t, X, times).square().mean()

    scale = torch.tensor(1.3, dtype=torch.float64)
    ours, plain = (
        jvp(grad(partial(end, method=method)), (scale,), (torch.ones_like(scale),))
        for method in (adjoint.checkpointed(ode.HEUN), ode.HEUN)
    )
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


class Callable:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x):
        return x * self.weight

    def method(self, x):
        return x + self.weight


def nested():
    weight = torch.tensor(3.0)

    def inner(x, *, scale=torch.tensor(2.0)):  # noqa: B008
        return x * weight * scale

    return lambda x: inner(x) + len("text")


HOLDERS = {
    "closure": nested,
    "partial": lambda: partial(torch.add, other=torch.tensor(3.0)),
    "callable object": lambda: Callable(torch.tensor(3.0)),
    "bound method": lambda: Callable(torch.tensor(3.0)).method,
    "function in a tree": lambda: partial(lambda functions, x: functions[0]["f"](x), [{"f": nested()}]),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_tensors_are_replaced_wherever_a_function_reads_them(name):
    holder, one = HOLDERS[name](), torch.tensor(1.0)
    value, held = holder(one), closures.tensors(holder)
    assert held and closures.replace_tensors(holder, held) is holder
    zeros = closures.replace_tensors(holder, [torch.zeros(()) for _ in held])
    assert zeros(one) != value and holder(one) == value


def test_a_function_that_holds_itself_is_walked_once():
    weight = torch.tensor(2.0)

    def power(x, n):
        return x if n == 0 else weight * power(x, n - 1)

    assert closures.tensors(power) == [weight]
    assert closures.tensors(len) == [] and closures.tensors([1, "a", None, torch.float32]) == []
