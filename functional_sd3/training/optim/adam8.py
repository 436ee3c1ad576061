"""AdamW with moments of one byte a number.

Dettmers et al. 2022, "8-bit optimizers via block-wise quantization" (arXiv:2110.02861): the moments are stored by
`blockwise` and are float32 while a step uses them, so that only what is kept between steps is rounded.
"""

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Params, Tree
from functional_sd3.training.optim import blockwise, by_leaf
from functional_sd3.training.optim.adam import AdamState
from functional_sd3.training.optim.compose import chain
from functional_sd3.training.optim.transforms import add_decayed_weights, scale_by_learning_rate
from functional_sd3.training.optim.types import Optimizer, like, zero_count
from functional_sd3.training.schedules import Schedule

MIN_SIZE = 4096
"""Leaves with fewer numbers keep float32 moments, as in the code of the paper's authors."""


def scale_by_adam8bit(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, min_size: int = MIN_SIZE) -> Optimizer:
    """The direction of `scale_by_adam` with both moments stored by `blockwise`: a leaf of at least `min_size` numbers
    is {"codes", "scale"} in the state's trees."""

    def init(params: Params) -> AdamState:
        return AdamState(zero_count(params), _moments(params, min_size, True), _moments(params, min_size, False))

    def update(grads: Tree, state: AdamState, params: Params) -> tuple[Tree, AdamState]:
        count = state.count + 1
        step = by_leaf.AdamStep(count, count, b1, b2, eps, 0.0)
        moments = lambda path: (by_leaf.at(state.mean, path), by_leaf.at(state.square, path))  # noqa: E731
        rows = [by_leaf.adam(grad, *moments(path), step) for path, grad in tree.flatten_paths(grads).items()]
        directions, mean, square = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
        return like(grads, directions), AdamState(count, like(grads, mean), like(grads, square))

    return Optimizer(init, update)


def adamw8bit(
    rate: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    decay: float = 0.01,
    mask: tree.Chooser = "*",
    min_size: int = MIN_SIZE,
) -> Optimizer:
    """`adamw` with moments of one byte a number; its donated form goes through each leaf in parts."""
    rule = scale_by_adam8bit(b1, b2, eps, min_size=min_size)
    pure = chain(rule, add_decayed_weights(decay, mask), scale_by_learning_rate(rate))
    parts = by_leaf.adamw_rule(rate, b1, b2, eps, decay, mask)
    return Optimizer(pure.init, pure.update, by_leaf.donated(parts), by_leaf=parts)


def _moments(params: Params, min_size: int, signed: bool) -> Tree:
    def stored(leaf: Tensor) -> Tree:
        if leaf.numel() < min_size:
            return torch.zeros_like(leaf, dtype=torch.float32)
        return blockwise.zeros(leaf.shape, signed=signed, device=leaf.device)

    return tree.map(stored, params)
