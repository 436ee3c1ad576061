"""Transforms of gradients: clipping, weight decay, and the learning rate."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from functional_sd3.core import leafwise, tree
from functional_sd3.core.types import Params, Tree
from functional_sd3.parallel import sharding
from functional_sd3.parallel.mesh import Mesh
from functional_sd3.parallel.placement import Layout
from functional_sd3.training.optim.types import CountState, Optimizer, global_norm, leafwise_rule, like, zero_count
from functional_sd3.training.schedules import Schedule, as_schedule


def clip_by_global_norm(limit: float, norm: Callable[[Tree], Tensor] = global_norm) -> Optimizer:
    """grads * min(1, limit / norm), norm over all leaves (Pascanu et al. 2013). `limit` must be positive."""
    if not limit > 0:
        raise ValueError(f"the norm to clip to is {limit}; it must be positive (leave the clipping out to have none)")

    def factor(norm: Tensor) -> Tensor:
        # A NaN norm must not be hidden by the minimum: the loop stops at it.
        return torch.where(norm > limit, limit / norm, torch.where(norm.isnan(), norm, 1.0))

    def update(grads: Tree, state: tuple, params: Params) -> tuple[Tree, tuple]:
        return like(grads, leafwise.multiply(tree.leaves(grads), factor(norm(grads)))), state

    def sharded(layout: Layout, mesh: Mesh) -> Optimizer:
        return clip_by_global_norm(limit, partial(sharding.norm, layout=layout, mesh=mesh))

    return Optimizer(lambda params: (), update, factor=factor, sharded=sharded)


def add_decayed_weights(decay: float, mask: tree.Chooser = "*") -> Optimizer:
    """updates + decay * params, on the leaves that `mask` chooses."""

    def update(grads: Tree, state: tuple, params: Params) -> tuple[Tree, tuple]:
        if not decay:
            return grads, state
        chosen = tree.select(params, mask)
        flat = tree.flatten_paths(grads)
        decayed = leafwise.add([flat[path] for path in chosen], list(chosen.values()), decay)
        return like(grads, list((flat | dict(zip(chosen, decayed, strict=True))).values())), state

    return leafwise_rule(Optimizer(lambda params: (), update))


def scale_by_schedule(schedule: Schedule) -> Optimizer:
    """updates * schedule(steps done before this one)."""

    def update(grads: Tree, state: CountState, params: Params) -> tuple[Tree, CountState]:
        return like(grads, leafwise.multiply(tree.leaves(grads), schedule(state.count))), CountState(state.count + 1)

    return leafwise_rule(Optimizer(lambda params: CountState(zero_count(params)), update))


def scale_by_learning_rate(rate: float | Schedule) -> Optimizer:
    """updates * -rate: turns a direction of ascent into a step of descent."""
    schedule = as_schedule(rate)
    return scale_by_schedule(lambda count: -schedule(count))
