"""A training step on a mesh is that of one process: gradients, clipping, optimisers and averages."""

import os

import pytest
import torch

from functional_sd3.core import prng, transform, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.spec import Param
from functional_sd3.parallel import mesh, sharding
from functional_sd3.training import muon, optim, step

BLOCK = {
    "in": Param((8, 4), specs.normal(0.5), ("hidden", "width")),
    "out": Param((4, 8), specs.normal(0.5), ("width", "hidden")),
}
SPEC = {
    "blocks": [BLOCK, BLOCK, BLOCK],
    "scale": Param((4,), specs.ones, ("width",)),
    "shift": Param((), specs.zeros, ()),
    "table": Param((4, 4), specs.normal(1.0), (None, "width"), trainable=False),
}


def loss(gather):
    def whole(params, batch, keys):
        def block(params, x):
            params = gather(params)
            return x + torch.tanh(x @ params["in"].T) @ params["out"].T

        rest = gather({name: part for name, part in params.items() if name != "blocks"})
        x = batch["x"] + prng.normal(keys, (4,)) @ rest["table"]
        for weights in params["blocks"]:
            x = transform.remat(block)(weights, x)
        error = (x * rest["scale"] + rest["shift"] - batch["x"]).square().mean()
        return error, {"half": error / 2, "bins": torch.stack([error, error])}

    return whole


def is_matrix(path, leaf):
    return "matrix" if "blocks" in path else "other"


RULES = {
    "adamw": lambda: optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(1e-2)),
    "masked": lambda: optim.chain(
        optim.clip_by_global_norm(0.5), optim.masked(optim.clip_by_global_norm(0.1), "blocks*"), optim.adamw(1e-2)
    ),
    "muon": lambda: optim.chain(
        optim.clip_by_global_norm(0.5),
        optim.partitioned({"matrix": muon.muon(1e-2), "other": optim.adamw(1e-2)}, is_matrix),
    ),
}


def train(grid, rule, donate, accumulate, steps=3, own_rows=False, **options):
    """Whole state after some steps, the metrics of the last, and the bytes of the state."""
    layout = sharding.layout(SPEC, grid)
    gather = sharding.materialize(layout, grid)
    train_step = step.make_train_step(
        loss(gather), RULES[rule](), trainable=step.trainable(SPEC), ema_decay=0.9, accumulate=accumulate,
        donate=donate, mesh=grid, layout=layout, own_rows=own_rows, **options,
    )  # fmt: skip
    params = sharding.init(prng.key(0), SPEC, layout, grid)
    state = step.init(prng.key(1), params, RULES[rule](), trainable=step.trainable(SPEC))
    for number in range(steps):
        x = prng.normal(prng.key(number + 2), (8, 4))
        if own_rows:
            x = x.chunk(grid.size("data", "fsdp"))[grid.index("data", "fsdp")]
        state, metrics = train_step(state, {"x": x})
    return sharding.whole(state, sharding.state_layout(state, layout, grid), grid), metrics, tree.nbytes(state)


def train_on(sizes, *args, **options):
    return train(mesh.init(sizes), *args, **options)


def error(ours, theirs):
    pairs = list(zip(tree.leaves(ours), tree.leaves(theirs), strict=True))
    scale = sum(y.double().square().sum() for _, y in pairs)
    return float((sum((x.double() - y.double()).square().sum() for x, y in pairs) / scale).sqrt())


CASES = [
    *(("adamw", sizes) for sizes in ({"data": 2}, {"data": 4}, {"fsdp": 2}, {"fsdp": 4}, {"data": 2, "fsdp": 2})),
    ("masked", {"fsdp": 2}),
    # Three matrices a round of two or four processes, whose last is not full.
    *(("muon", sizes) for sizes in ({"fsdp": 2}, {"fsdp": 4}, {"data": 2, "fsdp": 2})),
]


@pytest.mark.parametrize(("rule", "sizes"), CASES, ids=[f"{rule}-{mesh.describe(sizes)}" for rule, sizes in CASES])
def test_states_and_metrics_equal_those_of_one_process(processes, rule, sizes):
    count = mesh.math.prod(sizes.values())
    for donate, accumulate in ((True, 1), (False, 2)):
        state, metrics, size = train(mesh.init(), rule, donate, accumulate * count)
        for ours, our_metrics, our_size in processes(count, train_on, sizes, rule, donate, accumulate):
            assert error(ours, state) < 1e-6 and error(our_metrics, metrics) < 1e-6
            assert int(ours.step) == 3 and torch.equal(ours.key, state.key)
            if "data" not in sizes:
                assert our_size < size / count + 600


@pytest.mark.parametrize("count", [2, 4])
def test_data_parallel_steps_equal_accumulated_ones_to_the_bit(processes, same, count):
    alone = train(mesh.init(), "adamw", True, count)
    for own_rows in (False, True):
        for state, metrics, _ in processes(count, train_on, {"data": count}, "adamw", True, 1, own_rows=own_rows):
            assert same(state, alone[0]) and same(metrics, alone[1])


def test_gradients_of_torch_func_are_of_the_whole_batch(processes):
    state, metrics, _ = train(mesh.init(), "adamw", True, 1)
    for ours, our_metrics, _ in processes(2, train_on, {"fsdp": 2}, "adamw", True, 1, gradient="func"):
        assert error(ours, state) < 1e-6 and error(our_metrics, metrics) < 1e-6


def train_rows(sizes, size):
    """A step on a batch of any size, in parts of at most three rows."""
    grid = mesh.init(sizes)
    layout = sharding.layout(SPEC, grid)
    train_step = step.make_train_step(
        loss(sharding.materialize(layout, grid)), RULES["adamw"](), trainable=step.trainable(SPEC), rows=3, mesh=grid,
        layout=layout,
    )  # fmt: skip
    params = sharding.init(prng.key(0), SPEC, layout, grid)
    state = step.init(prng.key(1), params, RULES["adamw"](), trainable=step.trainable(SPEC))
    state, metrics = train_step(state, {"x": prng.normal(prng.key(2), (size, 4))})
    return sharding.whole(state, sharding.state_layout(state, layout, grid), grid), metrics


@pytest.mark.parametrize("size", [8, 7])
def test_with_rows_a_batch_that_does_not_divide_is_whole_on_all(processes, size):
    state, metrics = train_rows({}, size)
    for sizes in ({"data": 2}, {"fsdp": 2}):
        for ours, our_metrics in processes(2, train_rows, sizes, size):
            assert error(ours, state) < 1e-6 and error(our_metrics, metrics) < 1e-6


def refused():
    grid = mesh.init({"fsdp": int(os.environ["WORLD_SIZE"])})
    layout = sharding.layout(SPEC, grid)
    own = optim.Optimizer(lambda params: (), lambda grads, state, params: (grads, state))
    with pytest.raises(ValueError) as optimizer:
        step.make_train_step(loss(lambda params: params), optim.chain(own, optim.adamw(1.0)), mesh=grid, layout=layout)
    step.make_train_step(loss(lambda params: params), optim.leafwise_rule(own), mesh=grid, layout=layout)
    train_step = step.make_train_step(loss(lambda params: params), optim.adamw(1.0), mesh=grid)
    state = step.init(prng.key(0), specs.init(prng.key(0), SPEC), optim.adamw(1.0))
    with pytest.raises(ValueError) as batch:
        train_step(state, {"x": torch.zeros(3, 4)})
    return str(optimizer.value), str(batch.value)


def test_what_does_not_divide_is_refused(processes):
    for optimizer, batch in processes(2, refused):
        assert "does not say what it is on parts of leaves" in optimizer
        assert batch == "a batch of 3 cannot be divided over 2 processes (data and fsdp)"
