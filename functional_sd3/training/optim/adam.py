"""Adam and AdamW.

Kingma and Ba 2015, "Adam: a method for stochastic optimization"; Loshchilov and Hutter 2019, "Decoupled weight decay
regularization". Equal to `torch.optim.AdamW`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import leafwise, tree
from functional_sd3.core.rounding import Rounding
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.training.donation import check_strides, overlapping, with_strides_of
from functional_sd3.training.optim import by_leaf
from functional_sd3.training.optim.compose import chain
from functional_sd3.training.optim.transforms import add_decayed_weights, scale_by_learning_rate
from functional_sd3.training.optim.types import (
    CountState,
    Optimizer,
    ScaledGradients,
    leafwise_rule,
    like,
    unscaled,
    zero_count,
    zeros_like,
)
from functional_sd3.training.schedules import Schedule, as_schedule


class AdamState(NamedTuple):
    """Steps done, int64 (), and the moving averages of the gradient and of its square, trees like the parameters."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    mean: Tree
    square: Tree


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Optimizer:
    """mean / (1 - b1^n) / (sqrt(square / (1 - b2^n)) + eps) (Kingma and Ba 2015, algorithm 1)."""

    def update(grads: Tree, state: AdamState, params: Params) -> tuple[Tree, AdamState]:
        count = state.count + 1
        moments = tree.leaves(grads), tree.leaves(state.mean), tree.leaves(state.square)
        updates, mean, square = leafwise.adam(*moments, by_leaf.bias(b1, count), by_leaf.bias(b2, count), b1, b2, eps)
        return like(grads, updates), AdamState(count, like(grads, mean), like(grads, square))

    return leafwise_rule(
        Optimizer(lambda params: AdamState(zero_count(params), zeros_like(params), zeros_like(params)), update)
    )


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

    Its donated form is one fused kernel over all leaves where parameters are float32, else it goes through each leaf in
    parts; moments are float32.
    """
    pure = chain(scale_by_adam(b1, b2, eps), add_decayed_weights(decay, mask), scale_by_learning_rate(rate))
    schedule = as_schedule(rate)

    parts = by_leaf.adamw_rule(rate, b1, b2, eps, decay, mask)

    def donate(
        gradients: ScaledGradients, state: tuple, params: Params, key: Key | Rounding | None = None
    ) -> tuple[Params, tuple]:
        if any(leaf.dtype != torch.float32 for leaf in tree.leaves(params)):
            return by_leaf.donated(parts)(gradients, state, params, key)
        adam, decay_state, counted = state
        divisor = _divisor(gradients)
        grads = gradients.tree if divisor is not None else unscaled(gradients)
        weights, flat, mean, square = map(tree.flatten_paths, (params, grads, adam.mean, adam.square))
        count = (adam.count + 1).float()
        chosen = tree.select(params, mask) if decay else {}
        for paths, amount in ((list(chosen), decay), ([path for path in weights if path not in chosen], 0.0)):
            if paths:
                check_strides(paths, weights, mean, square)
                leaves, means, squares = ([part[path] for path in paths] for part in (weights, mean, square))
                # The kernel goes through memory and not through indices, so all four need the same strides.
                aligned = [with_strides_of(flat[path], weights[path]) for path in paths]
                rate = schedule(counted.count)
                leafwise.adamw_inplace(leaves, aligned, means, squares, count, divisor, rate, b1, b2, eps, amount)
        return params, (adam._replace(count=adam.count + 1), decay_state, CountState(counted.count + 1))

    return leafwise_rule(Optimizer(pure.init, pure.update, donate, by_leaf=parts))


def _divisor(gradients: ScaledGradients) -> Tensor | None:
    """The number by which a fused kernel may divide gradients; None where it may not.

    The kernel writes the quotients over the gradients, whose memory must then belong to them alone.
    """
    if gradients.scale is None or gradients.scale.device.type not in ("cpu", "cuda") or overlapping(gradients.tree):
        return None
    return 1 / gradients.scale
