"""The transformer divided over processes by heads and by tokens is the transformer, derivatives too."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from bench.timing import allocated_peak
from functional_sd3 import mmdit
from functional_sd3.core import transform, tree
from functional_sd3.parallel import mesh as meshes
from functional_sd3.parallel import tensor
from tests.parallel.examples import CONFIG, SPEC, differences, filled, inputs

MESHES = {2: [{"tensor": 2}, {"sequence": 2}], 4: [{"sequence": 4}, {"tensor": 2, "sequence": 2}]}
"""Six heads on four processes of a sequence do not divide: keys and values are gathered there."""


def scalar(params, arguments, **options):
    """A loss of the velocity, and the velocity."""
    velocity = mmdit.apply(params, CONFIG, *arguments, **options)
    return (velocity * torch.linspace(-1, 1, velocity.numel()).view(velocity.shape)).sum() + velocity.square().mean()


def tangents():
    return filled(SPEC, 5), tree.map(torch.ones_like, inputs())


@cache
def one_process():
    """Velocity, gradients and tangent of the whole transformer."""

    def one(params, arguments):
        return scalar(params, arguments)

    given = filled(SPEC), inputs()
    velocity = mmdit.apply(given[0], CONFIG, *given[1])
    return velocity, torch.func.grad(one, (0, 1))(*given), torch.func.jvp(one, given, tangents())[1]


def derivatives(sizes, options, expected):
    """Relative differences from one process: velocity, gradients by both engines, tangent."""
    mesh = meshes.init(sizes)
    options = {"block_transform": transform.remat} if options == "remat" else {}
    params, arguments = filled(SPEC), inputs()
    own = tensor.cut(params, SPEC, mesh, heads=CONFIG.heads)
    errors = {"cut": differences(params, tensor.whole(own, SPEC, mesh))}

    def divided(params, arguments):
        return scalar(params, arguments, mesh=mesh, **options)

    def joined(gradients):
        return tensor.whole(gradients[0], SPEC, mesh), gradients[1]

    velocity, wanted, tangent = expected
    errors["velocity"] = differences(velocity, mmdit.apply(own, CONFIG, *arguments, mesh=mesh, **options))
    errors["func.grad"] = differences(wanted, joined(torch.func.grad(divided, (0, 1))(own, arguments)))
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), (own, arguments))
    gradients = iter(torch.autograd.grad(divided(*leaves), tree.leaves(leaves), materialize_grads=True))
    errors["autograd"] = differences(wanted, joined(tree.map(lambda leaf: next(gradients), leaves)))
    moved = tangents()
    own_tangents = tensor.cut(moved[0], SPEC, mesh, heads=CONFIG.heads), moved[1]
    errors["jvp"] = differences(tangent, torch.func.jvp(divided, (own, arguments), own_tangents)[1])
    return errors


@pytest.mark.parametrize("options", ["plain", "remat"])
@pytest.mark.parametrize(("count", "sizes"), [(count, sizes) for count in MESHES for sizes in MESHES[count]], ids=str)
def test_a_divided_transformer_has_the_values_and_derivatives_of_one_process(processes, count, sizes, options):
    for errors in processes(count, derivatives, sizes, options, one_process()):
        assert errors.pop("cut") == 0
        assert errors.pop("velocity") < 1e-6, errors
        assert max(errors.values()) < 3e-6, errors


def peaks(sizes):
    """Bytes of a process: of its blocks, and beyond its arguments of gradients with remat."""
    mesh = meshes.init(sizes)
    own = tensor.cut(filled(SPEC), SPEC, mesh, heads=CONFIG.heads)
    config = replace(CONFIG, position_size=32)
    size = {"position": torch.zeros(1, config.position_size**2, config.width)}
    arguments = inputs(batch=4, height=48, width=48)

    def measured(params, mesh):
        params = {**params, **size}

        def loss(params):
            velocity = mmdit.apply(params, config, *arguments, mesh=mesh, block_transform=transform.remat)
            return velocity.square().mean()

        return tree.nbytes(params["blocks"]), allocated_peak(lambda: torch.func.grad(loss)(params))

    return measured(filled(SPEC), None), measured(own, mesh)


@pytest.mark.parametrize(("sizes", "bounds"), [({"sequence": 2}, (1, 0.65)), ({"tensor": 2}, (0.6, 0.8))], ids=str)
def test_a_process_needs_less_memory_than_one_alone(processes, sizes, bounds):
    """Of parameters and gradients. A velocity alone is left out: the backend frees what it exchanged on threads of its
    own, so that its peak, a few buffers, differs from run to run by more than is saved."""
    for alone, divided in processes(2, peaks, sizes):
        parts = [b / a for a, b in zip(alone, divided, strict=True)]
        assert all(part <= bound for part, bound in zip(parts, bounds, strict=True)), (alone, divided, parts)
