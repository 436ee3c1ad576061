"""Materialised parameters are not kept for the backward pass, whose gradients are the same to the bit."""

import pytest
import torch

from bench.timing import allocated_peak
from functional_sd3.core import prng, tree
from functional_sd3.core.computation import block_functions

DEPTH, WIDTH = 6, 128


def apply(block, x):
    return x + torch.tanh(x @ block["w"].t() + block["b"])


class Counted:
    """Materialises by doubling what is stored; counts."""

    calls = 0

    def __call__(self, block):
        self.calls += 1
        return {"w": 2 * block["w"], "b": block["b"]}


def network(params, x, block):
    for part in params:
        x = block(part, x)
    return x.square().mean()


@pytest.fixture
def params():
    keys = prng.split(prng.key(0), DEPTH)
    return [{"w": prng.normal(key, (WIDTH, WIDTH)) / WIDTH, "b": torch.zeros(WIDTH)} for key in keys]


@pytest.fixture
def x():
    return prng.normal(prng.key(1), (4, WIDTH))


def kept(materialize):
    """The block that saves what is materialised."""
    return lambda part, x: apply(materialize(part), x)


def gradients(params, x, block):
    learned = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    return torch.autograd.grad(network(learned, x, block), list(tree.leaves(learned)))


def test_parameters_are_materialised_again_in_the_backward_pass_and_gradients_have_the_same_bits(params, x):
    counted = Counted()
    expected = gradients(params, x, kept(Counted()))
    actual = gradients(params, x, block_functions(apply, counted, None, 1)[0])
    assert counted.calls == 2 * DEPTH - 1  # The first one has an input without a gradient.
    assert all(map(torch.equal, actual, expected))


def test_no_materialised_parameter_is_held_between_the_passes(params, x):
    """Of frozen matrices, beside which the gradients of the vectors are small."""

    def peak(block):
        def run():
            learned = [{"w": part["w"], "b": part["b"].clone().requires_grad_()} for part in params]
            return torch.autograd.grad(network(learned, x, block), [part["b"] for part in learned])

        return allocated_peak(run)

    saved = peak(kept(Counted())) - peak(block_functions(apply, Counted(), None, 1)[0])
    assert saved > (DEPTH - 2) * tree.nbytes(params[0])


def test_second_derivatives_and_graphs_that_are_read_twice(params, x):
    def twice(block):
        learned = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
        leaves = list(tree.leaves(learned))
        value = network(learned, x, block)
        first = torch.autograd.grad(value, leaves, create_graph=True)
        again = torch.autograd.grad(value, leaves, retain_graph=True)
        second = torch.autograd.grad(sum(leaf.square().sum() for leaf in first), leaves)
        return [*first, *again, *second]

    for ours, theirs in zip(twice(block_functions(apply, Counted(), None, 1)[0]), twice(kept(Counted())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_transforms_of_torch_func_are_those_of_the_function(params, x):
    def derivatives(block):
        loss = lambda part, x: network(part, x, block)  # noqa: E731
        tangents = tree.map(torch.ones_like, params)
        return [
            torch.func.grad(loss)(params, x),
            torch.func.jvp(lambda part: loss(part, x), (params,), (tangents,))[1],
            torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x[:, None]),
        ]

    ours, theirs = derivatives(block_functions(apply, Counted(), None, 1)[0]), derivatives(kept(Counted()))
    assert tree.allclose(ours, theirs, rtol=0, atol=0)


def test_views_of_materialised_leaves_and_leaves_that_are_passed_on(params, x):
    """Leaves that `materialize` passes on are no copies; views of a materialised leaf are read again as views."""
    counted = Counted()

    def half(block, x):
        return x + torch.tanh(x[..., : WIDTH // 2] @ block["w"][: WIDTH // 2].view(WIDTH // 2, WIDTH) * block["b"])

    actual = gradients(params, x, block_functions(half, counted, None, 1)[0])
    expected = gradients(params, x, lambda part, x: half(Counted()(part), x))
    assert all(map(torch.equal, actual, expected)) and counted.calls == 2 * DEPTH - 1
