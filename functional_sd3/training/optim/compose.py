"""Combinators of optimisers: `chain` in sequence, `partitioned` by labels of leaves, `masked` for chosen leaves."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.rounding import Rounding
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.parallel import sharding
from functional_sd3.parallel.mesh import Mesh
from functional_sd3.parallel.placement import Layout
from functional_sd3.training.optim.types import (
    Optimizer,
    ScaledGradients,
    UpdateLeaf,
    global_norm,
    like,
    sharded_rule,
    unscaled,
)


def chain(*optimizers: Optimizer, norm: Callable[[Tree], Tensor] = global_norm) -> Optimizer:
    """Optimisers applied one after the other; the state is the tuple of their states. norm: of gradients, where it is
    not known."""

    def init(params: Params) -> tuple:
        return tuple(optimizer.init(params) for optimizer in optimizers)

    def sharded(layout: Layout, mesh: Mesh) -> Optimizer:
        rules = (sharded_rule(optimizer, layout, mesh) for optimizer in optimizers)
        return chain(*rules, norm=partial(sharding.norm, layout=layout, mesh=mesh))

    def update(grads: Tree, state: tuple, params: Params) -> tuple[Tree, tuple]:
        states = []
        for optimizer, optimizer_state in zip(optimizers, state, strict=True):
            grads, optimizer_state = optimizer.update(grads, optimizer_state, params)
            states.append(optimizer_state)
        return grads, tuple(states)

    last_donate = optimizers[-1].donate if optimizers else None
    if last_donate is None:
        return Optimizer(init, update, sharded=sharded)

    def donate(
        gradients: ScaledGradients, state: tuple, params: Params, key: Key | Rounding | None = None
    ) -> tuple[Params, tuple]:
        states = []
        for optimizer, optimizer_state in zip(optimizers[:-1], state, strict=False):
            if optimizer.factor:
                gradients = _scaled_by(gradients, optimizer.factor, norm)
            else:
                grads, optimizer_state = optimizer.update(unscaled(gradients), optimizer_state, params)
                gradients = ScaledGradients(grads)
            states.append(optimizer_state)
        params, last = last_donate(gradients, state[-1], params, *(() if key is None else (key,)))
        return params, (*states, last)

    alone = _only(optimizers[0].by_leaf) if len(optimizers) == 1 else None
    return Optimizer(init, update, donate, by_leaf=alone, sharded=sharded)


def _only(by_leaf: Any) -> Any:
    """`by_leaf` of a chain of one rule."""

    def whole(state: tuple, params: Params) -> tuple[UpdateLeaf, tuple]:
        update_leaf, after = by_leaf(state[0], params)
        return update_leaf, (after,)

    return None if by_leaf is None else whole


def _scaled_by(
    gradients: ScaledGradients, factor: Callable[[Tensor], Tensor], norm_of: Callable[[Tree], Tensor]
) -> ScaledGradients:
    norm = norm_of(unscaled(gradients)) if gradients.norm is None else gradients.norm
    scale = factor(norm)
    return ScaledGradients(gradients.tree, scale if gradients.scale is None else gradients.scale * scale, norm * scale)


def partitioned(optimizers: dict[str, Optimizer], label: Callable[[str, Tensor], str]) -> Optimizer:
    """One optimiser for each label of leaves, `label(path, parameter)`: for instance Muon for matrices and AdamW for
    others.

    Raises ValueError naming the leaf whose label has no optimiser.
    """

    def split(params: Params) -> dict[str, Callable[[Tree], Tree]]:
        labels = tree.map_with_path(label, params)
        for path, name in tree.flatten_paths(labels).items():
            if name not in optimizers:
                raise ValueError(f"{path} is labelled {name!r}; the optimisers are {sorted(optimizers)}")

        def part(name: str) -> Callable[[Tree], Tree]:
            return lambda whole: tree.map(lambda leaf, label: leaf if label == name else {}, whole, labels)

        return {name: part(name) for name in optimizers}

    def init(params: Params) -> dict[str, Tree]:
        return {name: optimizers[name].init(part(params)) for name, part in split(params).items()}

    def update(grads: Tree, state: dict[str, Tree], params: Params) -> tuple[Tree, dict[str, Tree]]:
        states: dict[str, Tree] = {}
        updates: dict[str, Tensor] = {}
        for name, part in split(params).items():
            part_updates, states[name] = optimizers[name].update(part(grads), state[name], part(params))
            updates |= tree.flatten_paths(part_updates)
        return like(grads, [updates[path] for path in tree.flatten_paths(grads)]), states

    def sharded(layout: Layout, mesh: Mesh) -> Optimizer:
        return partitioned({name: sharded_rule(rule, layout, mesh) for name, rule in optimizers.items()}, label)

    return Optimizer(init, update, sharded=sharded)


def masked(optimizer: Optimizer, chooser: tree.Chooser) -> Optimizer:
    """`optimizer` on the chosen leaves; the updates of the others pass unchanged.

    Its `init` raises ValueError where the chooser, a glob or several, chooses none.
    """

    def init(params: Params) -> Tree:
        if not callable(chooser):
            tree.check_chosen("masked", params, chooser)
        return optimizer.init(tree.partition(params, chooser)[0])

    def update(grads: Tree, state: Tree, params: Params) -> tuple[Tree, Tree]:
        paths = set(tree.select(params, chooser))
        chosen, others = tree.partition(grads, lambda path, leaf: path in paths)
        updates, state = optimizer.update(chosen, state, tree.partition(params, lambda path, leaf: path in paths)[0])
        return tree.combine(updates, others), state

    return Optimizer(init, update, sharded=lambda layout, mesh: masked(sharded_rule(optimizer, layout, mesh), chooser))
