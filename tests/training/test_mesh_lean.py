"""Updates for less memory on a mesh: 8-bit moments, updates inside the backward pass."""

from dataclasses import replace

import pytest
import torch

from functional_sd3.core import prng, transform, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.rounding import Rounding
from functional_sd3.core.spec import Param
from functional_sd3.parallel import mesh as meshes
from functional_sd3.parallel import sharding, tensor
from functional_sd3.training import optim, step, update_rule

BLOCK = {
    "in": Param((512, 96), specs.normal(0.1), ("hidden", "width")),
    "out": Param((96, 512), specs.normal(0.1), ("width", "hidden")),
}
SPEC = {
    "qkv": Param((96, 32), specs.normal(0.1), ("qkv", "width")),
    "blocks": [BLOCK, BLOCK],
    "table": Param((1, 64, 96), specs.normal(0.1), (None, None, "width")),
    "scale": Param((96,), specs.ones, ("width",)),
    "unused": Param((96, 96), specs.normal(0.1), ("width", "width")),
}


def loss(gather):
    def whole(params, batch, keys):
        def block(params, x):
            params = tree.cast(gather(params), torch.float32)
            return x + torch.tanh(x @ params["in"].T) @ params["out"].T

        rest = gather({name: part for name, part in params.items() if name != "blocks"})
        rest = tree.cast(rest, torch.float32)
        x = batch["x"] + prng.normal(keys, (96,)) + rest["table"][0, :4].sum(0) + rest["qkv"].mean()
        for weights in params["blocks"]:
            x = transform.remat(block)(weights, x)
        return (x * rest["scale"]).square().mean(), {}

    return whole


def run(grid, rule, is_fused, parts=1):
    """Whole state after three steps without clipping, the metrics of the last, and the bytes of own moments."""
    layout = sharding.layout(SPEC, grid)
    rate = optim.warmup_constant(1e-2, 1)
    optimizer = update_rule.optimizer(replace(rule, fused=True), rate, clip=1.0, decay=0.01)
    train_step = update_rule.train_step(
        replace(rule, fused=is_fused), loss(sharding.materialize(layout, grid)), optimizer, rate, trainable="*",
        ema_decay=0.9, mesh=grid, layout=layout, accumulate=parts,
    )  # fmt: skip
    params = tree.cast(sharding.init(prng.key(0), SPEC, layout, grid), rule.weights)
    state = step.init(prng.key(1), params, optimizer, mesh=grid, layout=layout)
    moments = tree.nbytes(state.optimizer)
    for number in range(3):
        state, metrics = train_step(state, {"x": prng.normal(prng.key(number + 2), (4, 96))})
    return sharding.whole(state, sharding.state_layout(state, layout, grid), grid), metrics, moments


def both(sizes, rule):
    grid = meshes.init(sizes)
    return run(grid, rule, False), run(grid, rule, True)


def error(ours, theirs):
    pairs = list(zip(tree.leaves(ours), tree.leaves(theirs), strict=True))
    scale = sum(y.double().square().sum() for _, y in pairs)
    return float((sum((x.double() - y.double()).square().sum() for x, y in pairs) / scale).sqrt())


MESHES = ({"data": 2}, {"fsdp": 2}, {"data": 2, "fsdp": 2})


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("sizes", MESHES, ids=meshes.describe)
def test_an_update_in_the_backward_pass_is_that_after_it(processes, sizes, name):
    rule, count = update_rule.UpdateRule(name), meshes.math.prod(sizes.values())
    alone, metrics, moments = run(meshes.ONE_PROCESS, rule, False, count)
    for (plain, reported, size), (fused, same, _) in processes(count, both, sizes, rule):
        # The fused kernel of float32 AdamW rounds otherwise.
        assert not tree.diff(fused, plain) if name == "adamw8bit" else error(fused, plain) < 1e-6
        assert tree.allclose(same, reported, rtol=1e-5) and tree.allclose(reported, metrics, rtol=1e-5)
        assert {each.kind for each in tree.diff(plain, alone)} <= {"value"}
        assert error(plain.params, alone.params) < (1e-4 if name == "adamw8bit" else 1e-6)
        assert "data" in sizes or size < moments / count + 1500


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 2}, {"fsdp": 8}, {"tensor": 2}, {"fsdp": 2, "tensor": 2}], ids=meshes.describe
)
def test_8_bit_moments_of_parts_are_the_parts_of_those_of_the_whole_to_the_bit(sizes):
    """One process takes the place of each: without a batch nothing is sent."""
    params = specs.init(prng.key(0), SPEC)
    optimizer = optim.adamw8bit(1e-2)
    state = optimizer.init(params)
    start, count = state, meshes.math.prod(sizes.values())
    grads = [tree.map(lambda leaf, n=n: prng.normal(prng.key(n), leaf.shape), params) for n in range(3)]
    for each in grads:
        updates, state = optimizer.update(each, state, params)
    for rank in range(count):
        grid = meshes.Mesh(dict.fromkeys(meshes.AXES, 1) | sizes, rank)
        layout = sharding.layout(tensor.part_spec(SPEC, grid, heads=4), grid)
        own, rule = sharding.shard(params, layout, grid), optim.sharded_rule(optimizer, layout, grid)
        own_state = rule.init(own)
        placements = sharding.state_layout(own_state, layout, grid)
        assert not tree.diff(own_state, sharding.shard(start, placements, grid))
        for each in grads:
            own_updates, own_state = rule.update(sharding.shard(each, layout, grid), own_state, own)
        assert not tree.diff(own_state, sharding.shard(state, placements, grid))
        assert not tree.diff(own_updates, sharding.shard(updates, layout, grid))


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"tensor": 4}, {"fsdp": 2, "tensor": 2}], ids=meshes.describe)
def test_parts_are_rounded_stochastically_as_the_whole_is(sizes):
    params = tree.cast(specs.init(prng.key(0), SPEC), torch.bfloat16)
    updates = tree.map(lambda leaf: 1e-3 * prng.normal(prng.key(3), leaf.shape), params)
    key, weight = prng.key(7), torch.tensor(0.5)
    whole = optim.apply_updates(params, updates, key)
    average = optim.ema_update(params, whole, 0.5, weight, key=key)
    for rank in range(4):
        grid = meshes.Mesh(dict.fromkeys(meshes.AXES, 1) | sizes, rank)
        layout = sharding.layout(tensor.part_spec(SPEC, grid, heads=4), grid)
        rounding = Rounding(key, sharding.positions(layout, grid))
        start, moves = (sharding.shard(each, layout, grid) for each in (params, updates))
        own = optim.apply_updates(start, moves, rounding)
        assert not tree.diff(own, sharding.shard(whole, layout, grid))
        own_average = optim.ema_update(start, own, 0.5, weight, key=rounding)
        assert not tree.diff(own_average, sharding.shard(average, layout, grid))


def test_weights_in_bfloat16_learn_on_parts_as_on_the_whole(processes):
    """But for gradients that are rounded once, or in each part of the batch."""
    rule = update_rule.UpdateRule("adamw8bit", torch.bfloat16)
    alone, _, _ = run(meshes.ONE_PROCESS, rule, False, 2)
    start = specs.init(prng.key(0), SPEC)
    moved = error(alone.params, start)
    for (plain, _, _), (fused, _, _) in processes(2, both, {"fsdp": 2}, rule):
        assert not tree.diff(fused, plain) and {leaf.dtype for leaf in tree.leaves(plain.params)} == {torch.bfloat16}
        assert {each.kind for each in tree.diff(plain, alone)} <= {"value"}
        assert error(plain.params, alone.params) < 0.05 * moved


def test_parts_that_cut_blocks_are_refused():
    """Rows of 50 numbers have no blocks of their own."""
    spec = {"odd": Param((128, 50), specs.zeros, ("hidden", "width"))}
    grid = meshes.Mesh(dict.fromkeys(meshes.AXES, 1) | {"fsdp": 64})
    with pytest.raises(ValueError, match=r"blocks of the rows of odd \[128, 50\], of which the mesh fsdp=64 cuts some"):
        optim.sharded_rule(optim.adamw8bit(1e-2), sharding.layout(spec, grid), grid)
