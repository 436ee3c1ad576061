"""Types of optimisers, and the small functions of trees that they share."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from functional_sd3.core import leafwise, tree
from functional_sd3.core.rounding import Rounding
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.parallel.mesh import Mesh
from functional_sd3.parallel.placement import Layout


class ScaledGradients(NamedTuple):
    """Gradients with a deferred factor: `scale` (None: 1) times `tree`. norm: global norm of the product, None where
    it is not known."""

    tree: Tree
    scale: Tensor | None = None
    norm: Tensor | None = None


class UpdateLeaf(Protocol):
    """Updates one leaf of the parameters and its part of the state in place: path, gradient, factor on the gradient,
    and the key of the step, which rounds leaves in bfloat16 stochastically."""

    def __call__(
        self, path: str, gradient: Tensor, scale: Tensor | None = None, key: Key | Rounding | None = None
    ) -> None: ...


class Optimizer(NamedTuple):
    """An update rule as functions.

    donate: (gradients, state, params[, key]) -> (params, state), the whole step in place, for rules with a form of
    their own; the key, that rounds parameters in bfloat16 stochastically, is given only where it is used.
    factor: norm -> number, for rules that only multiply all gradients by it. `optim.donate` calls both, after checking
    what may be overwritten. by_leaf: (state, params) -> (update of one leaf, state after all of them), in place too,
    for rules that need no other leaf's gradient. sharded: (layout, mesh) -> the same rule on parts of leaves
    (`parallel.sharding`); None for one that is not known to have such a form (`leafwise_rule`, for one that treats
    every number alone).
    """

    init: Callable[[Params], Tree]
    update: Callable[[Tree, Tree, Params], tuple[Tree, Tree]]
    donate: Callable[..., tuple[Params, Tree]] | None = None
    factor: Callable[[Tensor], Tensor] | None = None
    by_leaf: Callable[[Any, Params], tuple[UpdateLeaf, Any]] | None = None
    sharded: Callable[[Layout, Mesh], "Optimizer"] | None = None


def leafwise_rule(optimizer: Optimizer) -> Optimizer:
    """A rule that treats every number of a leaf alone, so that it is the same on parts of leaves."""
    return optimizer._replace(sharded=lambda layout, mesh: optimizer)


def sharded_rule(optimizer: Optimizer, layout: Layout, mesh: Mesh) -> Optimizer:
    """`optimizer` on parts of leaves. Raises ValueError where it has no such form."""
    if optimizer.sharded is None:
        raise ValueError(
            f"the optimiser {optimizer.update.__qualname__} does not say what it is on parts of leaves: give it "
            "`sharded`, or `optim.leafwise_rule` if it treats every number alone, or divide only data (--mesh data=N)"
        )
    return optimizer.sharded(layout, mesh)


class CountState(NamedTuple):
    """Steps done, int64 ()."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count


def unscaled(gradients: ScaledGradients) -> Tree:
    """The gradients themselves, `scale` times `tree`."""
    if gradients.scale is None:
        return gradients.tree
    return like(gradients.tree, leafwise.multiply(tree.leaves(gradients.tree), gradients.scale))


def global_norm(updates: Tree) -> Tensor:
    """sqrt of the sum of squares of all leaves, float32 ()."""
    return leafwise.global_norm(tree.leaves(updates))


def zeros_like(params: Params) -> Tree:
    """Float32 zeros of the parameters' shapes."""
    return tree.map(lambda leaf: torch.zeros_like(leaf, dtype=torch.float32), params)


def zero_count(params: Params) -> Tensor:
    """Number of steps before the first, int64 (), on the device of the parameters."""
    leaves = tree.leaves(params)
    return torch.zeros((), dtype=torch.int64, device=leaves[0].device if leaves else "cpu")


def like(nested: Tree, leaves: list[Any]) -> Tree:
    """A tree of the structure of `nested` with other leaves, in order."""
    remaining = iter(leaves)
    return tree.map(lambda _: next(remaining), nested)
