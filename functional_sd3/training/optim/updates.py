"""Application of updates, purely or in place, and the moving average of parameters."""

import torch
from torch import Tensor

from functional_sd3.core import leafwise, tree
from functional_sd3.core.rounding import Rounding, as_rounding
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.training.donation import check_donated
from functional_sd3.training.optim import by_leaf
from functional_sd3.training.optim.types import Optimizer, ScaledGradients, like


def apply_updates(params: Params, updates: Tree, key: Key | Rounding | None = None) -> Params:
    """params + updates, in the parameters' dtypes; with a key those in bfloat16 are rounded stochastically (with a
    `Rounding` parts of leaves as the whole is)."""
    pairs = list(zip(tree.leaves(params), tree.leaves(updates), strict=True))
    if key is None:
        added = leafwise.add(*([list(column) for column in zip(*pairs, strict=True)] or ([], [])))
        return like(params, [new.to(old.dtype) for new, (old, _) in zip(added, pairs, strict=True)])
    # In float32 first, where updates are of the weights' dtype too. Leaf i is rounded by fold_in(key, i).
    sums = [torch.add(old.to(torch.promote_types(old.dtype, torch.float32)), update) for old, update in pairs]
    keys = [as_rounding(key).leaf(number, path) for number, path in enumerate(tree.flatten_paths(params))]
    return like(
        params, [by_leaf.rounded(new, old.dtype, own) for new, (old, _), own in zip(sums, pairs, keys, strict=True)]
    )


def donate(
    optimizer: Optimizer,
    grads: Tree,
    state: Tree,
    params: Params,
    *,
    norm: Tensor | None = None,
    checked: bool = False,
    key: Key | Rounding | None = None,
) -> tuple[Params, Tree]:
    """One step in place: `params` and `state` are overwritten, and the returned trees share their memory.

    `grads` may be overwritten too. norm: `global_norm(grads)` if it is known. checked: True if the caller has called
    `check_donated`. key: rounds parameters in bfloat16 stochastically. Raises ValueError when two leaves share memory
    or one takes part in a graph, either of which would silently give a wrong result.
    """
    if not checked:
        check_donated({"params": params, "state": state})
    with torch.no_grad():
        if optimizer.donate:
            return optimizer.donate(ScaledGradients(grads, norm=norm), state, params, *(() if key is None else (key,)))
        updates, state = optimizer.update(grads, state, params)
        if key is not None:
            for leaf, new in zip(tree.leaves(params), tree.leaves(apply_updates(params, updates, key)), strict=True):
                leaf.copy_(new)
            return params, state
        leafwise.add_inplace(tree.leaves(params), tree.leaves(updates))
        return params, state


def ema_decay(decay: float, step: Tensor) -> Tensor:
    """min(decay, (1 + step) / (10 + step)): early averages forget their random start quickly."""
    return torch.clamp((1 + step).float() / (10 + step), max=decay)


def ema_update(
    ema: Params,
    params: Params,
    decay: float | None,
    step: Tensor,
    *,
    donate: bool = False,
    key: Key | Rounding | None = None,
) -> Params:
    """ema + (1 - ema_decay(decay, step)) * (params - ema); `donate` writes into `ema`. No decay leaves `ema` as it is.

    key: rounds averages in bfloat16 stochastically, without which they would hardly move.
    """
    if decay is None:
        return ema
    means, ends, weight = tree.leaves(ema), tree.leaves(params), 1 - ema_decay(decay, step)
    if key is not None:
        return average(ema, params, weight, as_rounding(key), donate=donate)
    if donate:
        leafwise.lerp_inplace(means, ends, weight)
        return ema
    return like(ema, leafwise.lerp(means, ends, weight))


def average(old: Params, new: Params, weight: Tensor, rounding: Rounding, *, donate: bool = False) -> Params:
    """old + weight (new - old), leaves in bfloat16 rounded stochastically; `donate` writes into `old`."""
    moved = old if donate else like(old, [leaf.clone() for leaf in tree.leaves(old)])
    for number, ((path, leaf), end) in enumerate(zip(tree.flatten_paths(moved).items(), tree.leaves(new), strict=True)):
        by_leaf.average_inplace(leaf, end, weight, rounding.leaf(number, path))
    return moved
