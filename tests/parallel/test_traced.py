"""Collectives in one graph of torch.compile have the values and gradients that they have outside of it."""

import torch

from functional_sd3.core import prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.spec import Param
from functional_sd3.parallel import mesh as meshes
from functional_sd3.parallel import sharding, tensor

SPEC = {
    "in": {"weight": Param((8, 6), specs.normal(0.5), ("hidden", "width"))},
    "out": {"weight": Param((6, 8), specs.normal(0.5), ("width", "hidden"))},
}


def gradients(sizes, compiled):
    """The gradients of this process's part of an MLP, which is gathered over fsdp and divided over tensor, and of its
    input."""
    grid = meshes.init(sizes)
    layout = sharding.layout(tensor.part_spec(SPEC, grid, heads=4), grid)
    gather, group = sharding.materialize(layout, grid), grid.group("tensor")
    params = sharding.shard(specs.init(prng.key(0), SPEC), layout, grid)
    x = prng.normal(prng.key(1 + grid.index("fsdp")), (4, 6))

    def loss(leaves, x):
        whole = gather(dict(zip(params, ({"weight": leaf} for leaf in leaves), strict=True)))
        return tensor.mlp(whole, x, "gelu_tanh", group).square().mean()

    fn = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False) if compiled else loss
    leaves = [leaf.requires_grad_() for leaf in tree.leaves(params)]
    value = fn(leaves, x.requires_grad_())
    return value.detach(), *torch.autograd.grad(value, [*leaves, x])


def both(sizes):
    torch._dynamo.reset()
    return gradients(sizes, False), gradients(sizes, True)


def test_a_compiled_graph_gathers_and_sums_as_eager_functions_do(processes):
    for sizes in ({"fsdp": 2}, {"tensor": 2}):
        for eager, compiled in processes(2, both, sizes):
            for ours, theirs in zip(compiled, eager, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
