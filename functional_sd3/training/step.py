"""One training step as a pure function: `train_step(state, batch) -> (state, metrics)` for a loss and an optimiser.

Objectives draw from one key a sample, so a batch computed in parts gives the gradient of the whole batch.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import prng, transform, tree
from functional_sd3.core.rounding import Positions, Rounding
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.parallel import sharding
from functional_sd3.parallel.mesh import BATCH_AXES, ONE_PROCESS, Mesh
from functional_sd3.parallel.placement import Layout
from functional_sd3.training import optim
from functional_sd3.training.donation import overlapping
from functional_sd3.training.objectives import Loss, Metrics, flow_loss, vae_loss

__all__ = ["Loss", "Metrics", "TrainState", "flow_loss", "init", "make_train_step", "trainable", "vae_loss"]

Gradient = Callable[[Params, Params, Tree, Key], tuple[Params, tuple[Tensor, Metrics]]]


class TrainState(NamedTuple):
    """State of a run: parameters, optimiser state, moving average of the parameters, steps done (int64 ()), key.

    The optimiser's state covers the trainable leaves only; `ema` is a whole parameter tree, or {} where none is kept.
    """

    params: Params
    optimizer: Tree
    ema: Params
    step: Tensor
    key: Key

    def __repr__(self) -> str:
        """Parts of the state; all numbers of the parameters are too many to print."""
        return f"TrainState with\n{tree.summary(self, 1)}"


def init(
    key: Key,
    params: Params,
    optimizer: optim.Optimizer,
    *,
    trainable: tree.Chooser = "*",
    average: bool = True,
    mesh: Mesh | None = None,
    layout: Layout | None = None,
) -> TrainState:
    """The state before the first step. Parameters are copied, so a donated step does not overwrite the caller's.

    average: whether `ema` is kept; without it is {}. mesh, layout: as in `make_train_step`, for optimisers whose state
    depends on whole shapes, as adamw8bit's does. Raises ValueError where `trainable` chooses no parameter.
    """
    tree.check_chosen("trainable", params, trainable)
    optimizer = on_parts(optimizer, layout, mesh or ONE_PROCESS)
    device = next(iter(tree.leaves(params))).device
    copies = tree.map(_copy, params)
    ema = tree.map(_copy, params) if average else {}
    learned, _ = tree.partition(copies, trainable)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return TrainState(copies, optimizer.init(learned), ema, zero, key.to(device))


def _copy(leaf: Tensor) -> Tensor:
    # Always contiguous: a file keeps no strides, and a resumed run has to add in the same order.
    return leaf.detach().clone(memory_format=torch.contiguous_format)


def trainable(spec: Tree, only: tree.Chooser = "*") -> Callable[[str, Any], bool]:
    """Chooser of the trained leaves: those that the spec marks trainable and `only` chooses."""
    names = {name for name, param in tree.select(spec, only).items() if param.trainable}
    return lambda name, leaf: name in names


def make_train_step(
    loss: Loss,
    optimizer: optim.Optimizer,
    *,
    trainable: tree.Chooser = "*",
    ema_decay: float | None = 0.9999,
    accumulate: int = 1,
    rows: int | None = None,
    compile: bool = False,
    gradient: Literal["autograd", "func"] | None = None,
    donate: bool | Literal["debug"] = False,
    rate: optim.Schedule | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    mesh: Mesh | None = None,
    layout: Layout | None = None,
    own_rows: bool = False,
) -> Callable[[TrainState, Tree], tuple[TrainState, Metrics]]:
    """`train_step(state, batch) -> (state, metrics)` of a loss and an optimiser.

    ema_decay: of the average of the parameters; None for none, of a state that has none (`init(average=False)`).
    Sample i of step n draws from `split(fold_in(state.key, n), batch)[i]`. Metrics: loss, grad_norm, those of the loss,
    and the learning rate if `rate` is given.

    accumulate: number of parts a batch is computed in, for less memory and the same step. rows: the most samples of a
    part instead, for batches whose size changes from step to step. gradient: "func"
    (torch.func.grad_and_value; the default when compiled, as one graph) or "autograd" (`transform.value_and_grad`; the
    default in eager mode, where it takes half of the memory). donate: update the given state in place, after which it
    must not be used; "debug" makes using it raise. rounding: of parameters and averages in bfloat16; "stochastic"
    ones (`core.rounding`) keep the expected value of updates that are smaller than a weight's last place.

    mesh: the processes that share a batch. Each takes its rows and keys of it, in the order of the axes data and fsdp,
    and gradients are those of the whole batch: to the bit those of one process that takes it in as many parts. layout:
    of the parameters (`parallel.sharding`), of which the state then has this process's part, and which the loss gathers
    by `materialize`; None: whole on every process. Processes along sequence and tensor have the same rows and keys: the
    loss divides their work (`mmdit.apply`'s mesh). own_rows: a batch has this process's rows alone.

    With `rows`, a batch that does not divide is computed whole by all. Raises ValueError for one without `rows`, and
    for an optimiser without a form for parts of leaves.
    """
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding {rounding!r} must be 'nearest' or 'stochastic'")
    mesh = mesh or ONE_PROCESS
    if layout is None and mesh.size("tensor") > 1:
        raise ValueError(
            f"the mesh has tensor={mesh.size('tensor')}: make_train_step needs the layout of the parts, "
            "sharding.layout(tensor.part_spec(spec, mesh, heads=heads), mesh), for the norm of their gradients"
        )
    layout = layout if mesh.size("fsdp", "tensor") > 1 else None
    optimizer, positions = on_parts(optimizer, layout, mesh), sharding.positions(layout, mesh)
    if accumulate < 1:
        raise ValueError(f"accumulate {accumulate} must be at least 1")
    if rows is not None and (rows < 1 or accumulate > 1):
        raise ValueError(f"rows {rows} must be at least 1, and without accumulate {accumulate}")
    # The compiler does not follow collectives under torch.func.
    default = "func" if compile and mesh.size("fsdp", "sequence", "tensor") == 1 else "autograd"
    whole = _gradient(loss, gradient or default, compile)
    differentiate = _accumulated(whole, accumulate) if rows is None else _by_rows(whole, rows)

    def train_step(state: TrainState, batch: Tree) -> tuple[TrainState, Metrics]:
        own, keys = rows_and_keys(state, batch, mesh, own_rows, undivided=rows is not None)
        learned, fixed = tree.partition(state.params, trainable)
        grads, reported = differentiate(learned, fixed, own, keys)
        with torch.no_grad():
            if mesh.size(*BATCH_AXES) > 1:
                inplace = bool(donate) and not overlapping(grads)
                grads = sharding.sum_gradients(grads, layout, mesh, divisor=mesh.size(*BATCH_AXES), inplace=inplace)
                reported = sharding.mean(reported, mesh)
            value, others = reported
            norm = sharding.norm(grads, layout, mesh)
            metrics = {"loss": value, "grad_norm": norm, **others}
            if rate is not None:
                metrics["rate"] = rate(state.step)
            roundings = step_roundings(state, positions) if rounding == "stochastic" else (None, None)
            return _advance(optimizer, grads, norm, state, learned, fixed, ema_decay, donate, roundings), metrics

    return train_step


def on_parts(optimizer: optim.Optimizer, layout: Layout | None, mesh: Mesh) -> optim.Optimizer:
    """The rule on this process's parts of leaves."""
    has_parts = layout is not None and mesh.size("fsdp", "tensor") > 1
    return optim.sharded_rule(optimizer, layout, mesh) if has_parts else optimizer


def rows_and_keys(state: TrainState, batch: Tree, mesh: Mesh, own_rows: bool, *, undivided: bool) -> tuple[Tree, Key]:
    """This process's rows of a batch, and their keys. undivided: all of a batch that does not divide, not an error."""
    count, index = mesh.size(*BATCH_AXES), mesh.index(*BATCH_AXES)
    given = next(iter(tree.leaves(batch))).shape[0]
    size = given * count if own_rows else given
    keys = prng.split(prng.fold_in(state.key, state.step), size)
    if count == 1 or (undivided and size % count):
        return batch, keys
    if size % count:
        raise ValueError(f"a batch of {size} cannot be divided over {count} processes (data and fsdp)")
    rows = slice(index * size // count, (index + 1) * size // count)
    return batch if own_rows else tree.map(lambda leaf: leaf[rows], batch), keys[rows]


def _advance(
    optimizer: optim.Optimizer,
    grads: Params,
    norm: Tensor,
    state: TrainState,
    learned: Params,
    fixed: Params,
    ema_decay: float | None,
    donate: bool | str,
    roundings: tuple[Rounding, Rounding] | tuple[None, None] = (None, None),
) -> TrainState:
    weights_key, ema_key = roundings
    if not donate:
        updates, optimizer_state = optimizer.update(grads, state.optimizer, learned)
        params = tree.combine(optim.apply_updates(learned, updates, weights_key), fixed)
        ema = optim.ema_update(state.ema, params, ema_decay, state.step, key=ema_key)
        return TrainState(params, optimizer_state, ema, state.step + 1, state.key)
    optim.check_donated({"params": learned, "ema": state.ema, "optimizer": state.optimizer})
    learned, optimizer_state = optim.donate(
        optimizer, grads, state.optimizer, learned, norm=norm, checked=True, key=weights_key
    )
    params = tree.combine(learned, fixed)
    ema = optim.ema_update(state.ema, params, ema_decay, state.step, donate=True, key=ema_key)
    advanced = TrainState(params, optimizer_state, ema, state.step + 1, state.key)
    if donate == "debug":
        # Step count and key are never overwritten, so the old ones stay readable.
        params, optimizer_state, ema = optim.poison((advanced.params, advanced.optimizer, advanced.ema))
        advanced = TrainState(params, optimizer_state, ema, advanced.step, advanced.key)
    return advanced


def step_roundings(state: TrainState, positions: Mapping[str, Positions]) -> tuple[Rounding, Rounding]:
    """Stochastic rounding of parameters and averages in a step: by keys of no sample, as no run reaches step 2^32 - 1,
    which is folded in. positions: of leaves of which this process has a part."""
    key = prng.fold_in(prng.fold_in(state.key, 2**32 - 1), state.step)
    weights_key, ema_key = prng.split(key).unbind(-2)
    return Rounding(weights_key, positions), Rounding(ema_key, positions)


_GRADIENTS = ("autograd", "func")


def _gradient(loss: Loss, gradient: str, compile: bool) -> Gradient:
    def whole(learned: Params, fixed: Params, batch: Tree, keys: Key) -> tuple[Tensor, tuple[Tensor, Metrics]]:
        value, metrics = loss(tree.combine(learned, fixed), batch, keys)
        return value, (value.detach(), {name: metric.detach() for name, metric in metrics.items()})

    if gradient not in _GRADIENTS:
        raise ValueError(f"gradient {gradient!r} must be one of {', '.join(map(repr, _GRADIENTS))}")
    # A transform goes inside what is compiled: around it, torch.func would run the function eagerly.
    if gradient == "func":
        whole_gradient = torch.func.grad_and_value(whole, has_aux=True)
        return _without_graph(transform.compile(whole_gradient, dynamic=False) if compile else whole_gradient)
    compiled = transform.compile(whole, dynamic=False) if compile else whole
    return _without_graph(transform.value_and_grad(compiled, has_aux=True))


def _without_graph(gradient: Callable[..., Any]) -> Gradient:
    """`gradient` without the loss that carries a graph: only gradients, detached loss and metrics."""

    def gradients_and_metrics(*arguments: Any) -> tuple[Params, tuple[Tensor, Metrics]]:
        grads, (_, reported) = gradient(*arguments)
        return grads, reported

    return gradients_and_metrics


def _accumulated(differentiate: Gradient, parts: int) -> Gradient:
    if parts == 1:
        return differentiate

    def accumulated(learned: Params, fixed: Params, batch: Tree, keys: Key) -> tuple[Params, tuple[Tensor, Metrics]]:
        if len(keys) % parts:
            raise ValueError(f"a batch of {len(keys)} cannot be accumulated in {parts} equal parts")
        size = len(keys) // parts

        def part(start: int) -> Tree:
            some = slice(start, start + size)
            return differentiate(learned, fixed, tree.map(lambda leaf: leaf[some], batch), keys[some])

        sums, outline = _taken(part(0))
        for start in range(size, len(keys), size):
            sums = _added(sums, _taken(part(start))[0])
        return _filled(outline, _popped(sums, lambda leaf: leaf / parts))

    return accumulated


def _by_rows(differentiate: Gradient, rows: int) -> Gradient:
    def weighted(learned: Params, fixed: Params, batch: Tree, keys: Key) -> tuple[Params, tuple[Tensor, Metrics]]:
        def part(start: int) -> Tree:
            some = slice(start, start + rows)
            return differentiate(learned, fixed, tree.map(lambda leaf: leaf[some], batch), keys[some])

        count = len(keys)
        if count <= rows:
            return part(0)

        def scaled(start: int) -> tuple[list[Tensor], Tree]:
            share = min(rows, count - start) / count
            leaves, outline = _taken(part(start))
            return _popped(leaves, lambda leaf: share * leaf), outline

        sums, outline = scaled(0)
        for start in range(rows, count, rows):
            sums = _added(sums, scaled(start)[0])
        return _filled(outline, sums)

    return weighted


# Gradients are summed leaf by leaf, and each is freed once it is added: three trees of them are never held at once.


def _taken(value: Tree) -> tuple[list[Tensor], Tree]:
    """The leaves of a tree that nothing else holds, and the tree without them."""
    return tree.leaves(value), tree.map(lambda leaf: None, value)


def _popped(leaves: list[Tensor], fn: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """fn of each leaf; `leaves` is emptied."""
    leaves.reverse()
    return [fn(leaves.pop()) for _ in range(len(leaves))]


def _added(sums: list[Tensor], part: list[Tensor]) -> list[Tensor]:
    """sum + part of each leaf; both lists are emptied."""
    part.reverse()
    return _popped(sums, lambda leaf: leaf + part.pop())


def _filled(outline: Tree, leaves: list[Tensor]) -> Tree:
    values = iter(leaves)
    return tree.map(lambda _: next(values), outline)
