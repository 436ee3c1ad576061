"""Sharded parameters: the same initialisation, values, gradients and norm as whole ones, in less memory."""

import os
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.func import grad, jvp, vmap

from bench.timing import allocated_peak
from functional_sd3.core import prng, transform, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.spec import Param
from functional_sd3.parallel import mesh, sharding
from functional_sd3.text import t5
from functional_sd3.transformer import mmdit

CONFIG = mmdit.Config(
    depth=3,
    heads=2,
    head_dim=8,
    patch_size=1,
    in_channels=4,
    out_channels=4,
    context_width=12,
    pooled_width=8,
    position_size=4,
    sample_size=4,
    qk_norm=True,
    dual_attention_layers=(0,),
)
ENCODER = t5.Config(vocab=40, width=16, layers=2, heads=2, head_dim=8, mlp_width=16)


def nonzero(path, param):
    # A fresh network is zero behind its last layer, and so are its gradients.
    return Param(param.shape, specs.normal(0.2), param.axes) if param.init is specs.zeros else param


SPEC = specs.map_params(nonzero, mmdit.spec(CONFIG))


def grid_of(**sizes):
    return mesh.init(sizes or {"fsdp": int(os.environ["WORLD_SIZE"])})


def initialised():
    """Parts of two networks drawn alone, and put together."""
    grid, drawn = grid_of(), []
    for spec in (SPEC, t5.spec(ENCODER), {"scalar": Param((), specs.normal(1.0), ()), "three": odd()}):
        layout = sharding.layout(spec, grid)
        part = sharding.init(prng.key(0), spec, layout, grid)
        cut = sharding.shard(specs.init(prng.key(0), spec), layout, grid)
        drawn.append((part, cut, sharding.whole(part, layout, grid)))
    return drawn


def odd():
    return Param((3, 5), specs.fan_in_uniform(5), ("out", "in"))


@pytest.mark.parametrize("count", [2, 4])
def test_a_process_draws_its_own_part_of_the_initial_parameters_to_the_bit(processes, same, count):
    everything = [specs.init(prng.key(0), spec) for spec in (SPEC, t5.spec(ENCODER))]
    for drawn in processes(count, initialised):
        for (part, cut, whole), expected in zip(drawn, everything, strict=False):
            assert same(part, cut) and same(whole, expected)
            assert tree.nbytes(part) <= tree.nbytes(whole) / count * 1.01
        # What does not divide is whole everywhere.
        assert drawn[2][0]["three"].shape == (3, 5) and drawn[2][0]["scalar"].shape == ()


def test_a_part_of_a_draw_is_that_part_of_the_whole():
    key, shape = prng.key(3), (3, 4, 5)
    for dim in range(3):
        part = prng.Part(shape, dim, 1, 2)
        for draw in (prng.normal, prng.uniform, prng.bits, partial(prng.normal, dtype=torch.float64)):
            assert torch.equal(draw(key, part), draw(key, shape).narrow(dim, 1, 2))
        keys = prng.split(key, 2)
        assert torch.equal(prng.normal(keys, part), prng.normal(keys, shape).narrow(dim + 1, 1, 2))
    # Counters of more than 32 bits, of which the whole could not be drawn.
    huge = prng.Part((2**33, 2), 0, 2**32, 1)
    again = prng.Part((2**34,), 0, 2**33, 2)
    assert torch.equal(prng.bits(key, huge)[0], prng.bits(key, again))
    assert not torch.equal(prng.bits(key, again), prng.bits(key, 2))


def inputs(batch=2):
    keys = prng.split(prng.key(1), 4)
    x, context = prng.normal(keys[0], (batch, 4, 4, 4)), prng.normal(keys[1], (batch, 3, 12))
    return x, prng.uniform(keys[2], (batch,)), context, prng.normal(keys[3], (batch, 8))


def loss(params, x, t, context, pooled, **options):
    return (mmdit.apply(params, CONFIG, x, t, context, pooled, **options) - x).square().mean()


def derivatives(params, arguments, **options):
    """Gradients of one process's rows by all transforms, and tangents."""
    f = partial(loss, **options)
    remat = partial(loss, **options, block_transform=transform.remat)
    tangents = tree.map(torch.cos, params)
    samples = tuple(part[:, None] for part in arguments)
    return {
        "value": f(params, *arguments),
        "autograd": transform.value_and_grad(f)(params, *arguments)[0],
        "autograd, remat": transform.value_and_grad(remat)(params, *arguments)[0],
        "grad": grad(f)(params, *arguments),
        "grad, remat": grad(remat)(params, *arguments),
        "jvp": jvp(lambda params: f(params, *arguments), (params,), (tangents,))[1],
        "hvp": transform.hvp(lambda params: f(params, *arguments), params, tangents),
        "vmap(grad)": vmap(grad(f), in_dims=(None, 0, 0, 0, 0))(params, *samples),
    }


def sharded_derivatives(sizes):
    grid = grid_of(**sizes)
    layout = sharding.layout(SPEC, grid)
    params = sharding.init(prng.key(0), SPEC, layout, grid)
    count = grid.size("data", "fsdp")
    rows = slice(grid.index("data", "fsdp"), None, count)
    gather = sharding.materialize(layout, grid)
    results = derivatives(params, [part[rows] for part in inputs(4)], materialize=gather)
    for name in list(results):
        if "grad" in name or name == "hvp":
            summed = results[name]
            if name == "vmap(grad)":
                summed = tree.map(lambda leaf: leaf.mean(0), summed)
            summed = sharding.sum_gradients(summed, layout, grid)
            summed = tree.map(lambda leaf: leaf / count, summed)
            results[name] = sharding.norm(summed, layout, grid), sharding.whole(summed, layout, grid)
    # Tangents of shards are those of the whole: every process has the tangent of its own rows.
    return results


@pytest.mark.parametrize("sizes", [{"fsdp": 2}, {"data": 2, "fsdp": 2}, {"fsdp": 4}, {"data": 4}], ids=mesh.describe)
def test_gradients_through_gathered_blocks_equal_those_of_one_process(processes, sizes):
    params = specs.init(prng.key(0), SPEC)
    expected = derivatives(params, inputs(4))
    total = expected["vmap(grad)"] = tree.map(lambda leaf: leaf.mean(0), expected["vmap(grad)"])
    count = mesh.math.prod(sizes.values())
    everyone = processes(count, sharded_derivatives, sizes)
    for name in ("value", "jvp"):
        value = torch.stack([results[name] for results in everyone]).mean()
        torch.testing.assert_close(value, expected[name], rtol=2e-6, atol=2e-6)
    for results in everyone:
        for name in expected.keys() - {"value", "jvp"}:
            norm, whole = results[name]
            wanted = expected[name]
            assert error(whole, wanted) < 2e-6, name
            torch.testing.assert_close(
                norm, torch.stack([x.norm() for x in tree.leaves(wanted)]).norm(), rtol=2e-6, atol=0
            )
    assert error(total, expected["grad"]) < 1e-5


def error(ours, theirs):
    pairs = list(zip(tree.leaves(ours), tree.leaves(theirs), strict=True))
    return float(sum((x - y).square().sum() for x, y in pairs).sqrt() / sum(y.square().sum() for _, y in pairs).sqrt())


DEEP = mmdit.Config(
    depth=8, heads=2, head_dim=32, patch_size=1, in_channels=4, out_channels=4, context_width=12, pooled_width=8,
    position_size=4, sample_size=4,
)  # fmt: skip


def peak(sizes):
    """Peak bytes of a gradient step of one process beyond the parameters it has, and these."""
    grid = grid_of(**sizes)
    spec = mmdit.spec(DEEP)
    layout = sharding.layout(spec, grid)
    params = sharding.init(prng.key(0), spec, layout, grid)

    def step():
        remat = partial(apply, materialize=sharding.materialize(layout, grid), block_transform=transform.remat)
        return transform.value_and_grad(remat)(params, *inputs())

    def apply(params, x, t, context, pooled, **options):
        return (mmdit.apply(params, DEEP, x, t, context, pooled, **options) - x).square().mean()

    step()
    with pytest.MonkeyPatch.context() as patch:
        # The profiler misses what the backend's thread frees: it is given the time to be the first to let go.
        for name in ("all_to_all_single", "all_gather_single"):
            patch.setattr(dist, name, partial(patiently, getattr(dist, name)))
        return tree.nbytes(params), allocated_peak(step)


def patiently(collective, *args, **kwargs):
    work = collective(*args, **kwargs, async_op=True)
    work.wait()
    time.sleep(0.003)


def test_a_process_holds_its_part_and_one_block(processes):
    (whole, alone), *_ = processes(2, peak, {"data": 2})
    for part, own in processes(2, peak, {"fsdp": 2}):
        assert part == whole / 2
        # Half of the gradients, and of one block the parameters and the gradients, and those of its part.
        assert own < 0.5 * alone + 2.5 * whole / DEEP.depth


def test_rules_choose_the_dimension_and_what_does_not_divide_is_whole():
    grid = mesh.Mesh({**dict.fromkeys(mesh.AXES, 1), "fsdp": 2})
    spec = {"w": Param((6, 4), specs.zeros, ("hidden", "width")), "b": Param((3,), specs.zeros, ("width",))}
    assert sharding.layout(spec, grid)["w"] == sharding.Placement((6, 4), 0)
    assert sharding.layout(spec, grid, {"width": "fsdp"})["w"] == sharding.Placement((6, 4), 1)
    assert sharding.layout(spec, grid)["b"] == sharding.Placement((3,), None)
    with pytest.raises(ValueError, match="tensor"):
        sharding.layout(spec, grid, {"width": "tensor"})


def test_shards_of_another_shape_are_refused_and_leaves_beside_the_spec_pass():
    grid = mesh.init()
    layout = {"blocks": [{"w": sharding.Placement((4, 4))}], "out": sharding.Placement((2,))}
    gather = sharding.materialize(layout, grid, dtype=torch.bfloat16)
    block = gather({"w": torch.ones(4, 4), "low_rank": {"up": torch.ones(4, 1)}, "codes": torch.ones(2).to(torch.int8)})
    assert block["w"].dtype == torch.bfloat16 and block["codes"].dtype == torch.int8 and "up" in block["low_rank"]
    with pytest.raises(ValueError, match=r"w has shape \[4, 2\]; the part of this process has shape \[4, 4\]"):
        gather({"w": torch.ones(4, 2)})
    layout = {"blocks": [{"w": sharding.Placement((4, 4), 0)}, {"w": sharding.Placement((2, 8), 1)}]}
    two = mesh.Mesh({**dict.fromkeys(mesh.AXES, 1), "fsdp": 2})
    with pytest.raises(ValueError, match="blocks.1.w has a part of shape"):
        sharding.materialize(layout, two)
