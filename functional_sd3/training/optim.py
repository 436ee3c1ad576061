"""Optimisers as values: `init(params) -> state`, `update(grads, state, params) -> (updates, state)`, joined by `chain`.

The shape of optax on PyTorch trees. Updates are added to the parameters, so a descent step is negative. Everything is
pure but `donate`, which updates in place.
AdamW: Loshchilov and Hutter 2019, "Decoupled weight decay regularization", equal to `torch.optim.AdamW`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import leafwise, tree
from functional_sd3.core.types import Params, Tree
from functional_sd3.training.donation import (  # noqa: F401
    check_donated,
    check_strides,
    overlapping,
    poison,
    with_strides_of,
)
from functional_sd3.training.schedules import (  # noqa: F401
    Schedule,
    as_schedule,
    constant,
    trapezoid,
    warmup_constant,
    warmup_cosine,
)


class ScaledGradients(NamedTuple):
    """Gradients with a deferred factor: `scale` (None: 1) times `tree`. norm: global norm of the product, None where
    it is not known."""

    tree: Tree
    scale: Tensor | None = None
    norm: Tensor | None = None


class Optimizer(NamedTuple):
    """An update rule as functions.

    donate: (gradients, state, params) -> (params, state), the whole step in place, for rules with a fused kernel.
    factor: norm -> number, for rules that only multiply all gradients by it. The function `donate` below calls both
    after checking what may be overwritten.
    """

    init: Callable[[Params], Tree]
    update: Callable[[Tree, Tree, Params], tuple[Tree, Tree]]
    donate: Callable[[ScaledGradients, Tree, Params], tuple[Params, Tree]] | None = None
    factor: Callable[[Tensor], Tensor] | None = None


class CountState(NamedTuple):
    """Steps done, int64 ()."""

    count: Tensor


class AdamState(NamedTuple):
    """Steps done, int64 (), and the moving averages of the gradient and of its square, trees like the parameters."""

    count: Tensor
    mean: Tree
    square: Tree


def chain(*optimizers: Optimizer) -> Optimizer:
    """Optimisers applied one after the other; the state is the tuple of their states."""

    def update(grads: Tree, state: tuple, params: Params) -> tuple[Tree, tuple]:
        states = []
        for optimizer, own in zip(optimizers, state, strict=True):
            grads, own = optimizer.update(grads, own, params)
            states.append(own)
        return grads, tuple(states)

    def donate(gradients: ScaledGradients, state: tuple, params: Params) -> tuple[Params, tuple]:
        states = []
        for optimizer, own in zip(optimizers[:-1], state, strict=False):
            if optimizer.factor:
                gradients = _times(gradients, optimizer.factor)
            else:
                grads, own = optimizer.update(unscaled(gradients), own, params)
                gradients = ScaledGradients(grads)
            states.append(own)
        params, last = optimizers[-1].donate(gradients, state[-1], params)
        return params, (*states, last)

    whole = donate if optimizers and optimizers[-1].donate else None
    return Optimizer(lambda params: tuple(optimizer.init(params) for optimizer in optimizers), update, whole)


def clip_by_global_norm(limit: float) -> Optimizer:
    """grads * min(1, limit / norm), norm over all leaves (Pascanu et al. 2013). `limit` must be positive."""
    if not limit > 0:
        raise ValueError(f"the norm to clip to is {limit}; it must be positive (leave the clipping out to have none)")

    def factor(norm: Tensor) -> Tensor:
        # A NaN norm must not be hidden by the minimum: the loop stops at it.
        return torch.where(norm > limit, limit / norm, torch.where(norm.isnan(), norm, 1.0))

    def update(grads: Tree, state: tuple, params: Params) -> tuple[Tree, tuple]:
        return _like(grads, leafwise.multiply(tree.leaves(grads), factor(global_norm(grads)))), state

    return Optimizer(lambda params: (), update, factor=factor)


def _times(gradients: ScaledGradients, factor: Callable[[Tensor], Tensor]) -> ScaledGradients:
    norm = global_norm(unscaled(gradients)) if gradients.norm is None else gradients.norm
    scale = factor(norm)
    return ScaledGradients(gradients.tree, scale if gradients.scale is None else gradients.scale * scale, norm * scale)


def _divisor(gradients: ScaledGradients) -> Tensor | None:
    """The number by which a fused kernel may divide gradients; None where it may not.

    The kernel writes the quotients over the gradients, whose memory must then belong to them alone.
    """
    if gradients.scale is None or gradients.scale.device.type not in ("cpu", "cuda") or overlapping(gradients.tree):
        return None
    return 1 / gradients.scale


def unscaled(gradients: ScaledGradients) -> Tree:
    if gradients.scale is None:
        return gradients.tree
    return _like(gradients.tree, leafwise.multiply(tree.leaves(gradients.tree), gradients.scale))


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Optimizer:
    """mean / (1 - b1^n) / (sqrt(square / (1 - b2^n)) + eps) (Kingma and Ba 2015, algorithm 1)."""

    def update(grads: Tree, state: AdamState, params: Params) -> tuple[Tree, AdamState]:
        count = state.count + 1
        moments = tree.leaves(grads), tree.leaves(state.mean), tree.leaves(state.square)
        updates, mean, square = leafwise.adam(*moments, _bias(b1, count), _bias(b2, count), b1, b2, eps)
        return _like(grads, updates), AdamState(count, _like(grads, mean), _like(grads, square))

    return Optimizer(lambda params: AdamState(_zero(params), zeros_like(params), zeros_like(params)), update)


def add_decayed_weights(decay: float, mask: tree.Chooser = "*") -> Optimizer:
    """updates + decay * params, on the leaves that `mask` chooses."""

    def update(grads: Tree, state: tuple, params: Params) -> tuple[Tree, tuple]:
        if not decay:
            return grads, state
        chosen = tree.select(params, mask)
        flat = tree.flatten_paths(grads)
        decayed = leafwise.add([flat[path] for path in chosen], list(chosen.values()), decay)
        return _like(grads, list((flat | dict(zip(chosen, decayed, strict=True))).values())), state

    return Optimizer(lambda params: (), update)


def scale_by_schedule(schedule: Schedule) -> Optimizer:
    """updates * schedule(steps done before this one)."""

    def update(grads: Tree, state: CountState, params: Params) -> tuple[Tree, CountState]:
        return _like(grads, leafwise.multiply(tree.leaves(grads), schedule(state.count))), CountState(state.count + 1)

    return Optimizer(lambda params: CountState(_zero(params)), update)


def scale_by_learning_rate(rate: float | Schedule) -> Optimizer:
    """updates * -rate: turns a direction of ascent into a step of descent."""
    schedule = as_schedule(rate)
    return scale_by_schedule(lambda count: -schedule(count))


def adamw(
    rate: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    decay: float = 0.01,
    mask: tree.Chooser = "*",
) -> Optimizer:
    """params - rate * (Adam direction + decay * params), decay on the leaves that `mask` chooses.

    Its donated form is one fused kernel over all leaves; parameters and moments then have to be float32.
    """
    pure = chain(scale_by_adam(b1, b2, eps), add_decayed_weights(decay, mask), scale_by_learning_rate(rate))
    schedule = as_schedule(rate)

    def donate(gradients: ScaledGradients, state: tuple, params: Params) -> tuple[Params, tuple]:
        adam, rest, counted = state
        divisor = _divisor(gradients)
        grads = gradients.tree if divisor is not None else unscaled(gradients)
        weights, flat, mean, square = map(tree.flatten_paths, (params, grads, adam.mean, adam.square))
        count = (adam.count + 1).float()
        chosen = tree.select(params, mask) if decay else {}
        for paths, amount in ((list(chosen), decay), ([path for path in weights if path not in chosen], 0.0)):
            if paths:
                check_strides(paths, weights, mean, square)
                owned = [[flat_tree[path] for path in paths] for flat_tree in (weights, mean, square)]
                # The kernel walks through memory and not through indices, so all four need the same strides.
                lists = [owned[0], [with_strides_of(flat[path], weights[path]) for path in paths], *owned[1:]]
                rate = schedule(counted.count)
                leafwise.adamw_inplace(*lists, count, divisor, rate, b1, b2, eps, amount)
        return params, (adam._replace(count=adam.count + 1), rest, CountState(counted.count + 1))

    return Optimizer(pure.init, pure.update, donate)


def partitioned(optimizers: dict[str, Optimizer], label: Callable[[str, Tensor], str]) -> Optimizer:
    """One optimiser for each label of leaves, `label(path, parameter)`: matrices by Muon and the rest by AdamW, say.

    Raises ValueError naming the leaf whose label has no optimiser.
    """

    def split(params: Params) -> dict[str, Callable[[Tree], Tree]]:
        labels = tree.map_with_path(label, params)
        for path, name in tree.flatten_paths(labels).items():
            if name not in optimizers:
                raise ValueError(f"{path} is labelled {name!r}; the optimisers are {sorted(optimizers)}")
        return {
            name: lambda whole, name=name: tree.map(lambda leaf, own: leaf if own == name else {}, whole, labels)
            for name in optimizers
        }

    def init(params: Params) -> dict[str, Tree]:
        return {name: optimizers[name].init(part(params)) for name, part in split(params).items()}

    def update(grads: Tree, state: dict[str, Tree], params: Params) -> tuple[Tree, dict[str, Tree]]:
        states, updates = {}, {}
        for name, part in split(params).items():
            own, states[name] = optimizers[name].update(part(grads), state[name], part(params))
            updates |= tree.flatten_paths(own)
        return _like(grads, [updates[path] for path in tree.flatten_paths(grads)]), states

    return Optimizer(init, update)


def masked(optimizer: Optimizer, chooser: tree.Chooser) -> Optimizer:
    """`optimizer` on the chosen leaves; the updates of the others pass unchanged."""

    def init(params: Params) -> Tree:
        return optimizer.init(tree.partition(params, chooser)[0])

    def update(grads: Tree, state: Tree, params: Params) -> tuple[Tree, Tree]:
        paths = set(tree.select(params, chooser))
        mine, others = tree.partition(grads, lambda path, leaf: path in paths)
        mine, state = optimizer.update(mine, state, tree.partition(params, lambda path, leaf: path in paths)[0])
        return tree.combine(mine, others), state

    return Optimizer(init, update)


def apply_updates(params: Params, updates: Tree) -> Params:
    """params + updates, in the parameters' dtypes."""
    added = leafwise.add(tree.leaves(params), tree.leaves(updates))
    return _like(params, [new.to(old.dtype) for new, old in zip(added, tree.leaves(params), strict=True)])


def global_norm(updates: Tree) -> Tensor:
    """sqrt of the sum of squares of all leaves, float32 ()."""
    return leafwise.global_norm(tree.leaves(updates))


def donate(
    optimizer: Optimizer,
    grads: Tree,
    state: Tree,
    params: Params,
    *,
    norm: Tensor | None = None,
    checked: bool = False,
) -> tuple[Params, Tree]:
    """One step in place: `params` and `state` are overwritten, and the returned trees share their memory.

    `grads` may be overwritten too. norm: `global_norm(grads)` if it is known. checked: True if the caller has called
    `check_donated`. Raises ValueError when two leaves share memory or one takes part in a graph, either of which would
    silently give a wrong result.
    """
    if not checked:
        check_donated({"params": params, "state": state})
    with torch.no_grad():
        if optimizer.donate:
            return optimizer.donate(ScaledGradients(grads, norm=norm), state, params)
        updates, state = optimizer.update(grads, state, params)
        leafwise.add_inplace(tree.leaves(params), tree.leaves(updates))
        return params, state


def ema_decay(decay: float, step: Tensor) -> Tensor:
    """min(decay, (1 + step) / (10 + step)): a young average forgets its random start quickly."""
    return torch.clamp((1 + step).float() / (10 + step), max=decay)


def ema_update(ema: Params, params: Params, decay: float, step: Tensor, *, donate: bool = False) -> Params:
    """ema + (1 - ema_decay(decay, step)) * (params - ema); `donate` writes into `ema`."""
    means, ends, weight = tree.leaves(ema), tree.leaves(params), 1 - ema_decay(decay, step)
    if donate:
        leafwise.lerp_inplace(means, ends, weight)
        return ema
    return _like(ema, leafwise.lerp(means, ends, weight))


def _bias(beta: float, count: Tensor) -> Tensor:
    # 1 - beta ** n without its cancellation, which costs four of float32's seven digits at n = 1.
    return -torch.expm1(count.float() * math.log(beta)) if beta else torch.ones_like(count, dtype=torch.float32)


def _zero(params: Params) -> Tensor:
    leaves = tree.leaves(params)
    return torch.zeros((), dtype=torch.int64, device=leaves[0].device if leaves else "cpu")


def zeros_like(params: Params) -> Tree:
    """Float32 zeros of the parameters' shapes."""
    return tree.map(lambda leaf: torch.zeros_like(leaf, dtype=torch.float32), params)


def _like(nested: Tree, leaves: list[Any]) -> Tree:
    remaining = iter(leaves)
    return tree.map(lambda _: next(remaining), nested)
