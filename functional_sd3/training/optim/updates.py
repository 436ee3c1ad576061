"""Application of updates, purely or in place, and the moving average of parameters."""

import torch
from torch import Tensor

from functional_sd3.core import leafwise, tree
from functional_sd3.core.types import Params, Tree
from functional_sd3.training.donation import check_donated
from functional_sd3.training.optim.types import Optimizer, ScaledGradients, like


def apply_updates(params: Params, updates: Tree) -> Params:
    """params + updates, in the parameters' dtypes."""
    added = leafwise.add(tree.leaves(params), tree.leaves(updates))
    return like(params, [new.to(old.dtype) for new, old in zip(added, tree.leaves(params), strict=True)])


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
    """min(decay, (1 + step) / (10 + step)): early averages forget their random start quickly."""
    return torch.clamp((1 + step).float() / (10 + step), max=decay)


def ema_update(ema: Params, params: Params, decay: float, step: Tensor, *, donate: bool = False) -> Params:
    """ema + (1 - ema_decay(decay, step)) * (params - ema); `donate` writes into `ema`."""
    means, ends, weight = tree.leaves(ema), tree.leaves(params), 1 - ema_decay(decay, step)
    if donate:
        leafwise.lerp_inplace(means, ends, weight)
        return ema
    return like(ema, leafwise.lerp(means, ends, weight))
