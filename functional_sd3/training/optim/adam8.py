"""AdamW with moments of one byte a number.

Dettmers et al. 2022, "8-bit optimizers via block-wise quantization" (arXiv:2110.02861): the moments are stored by
`blockwise` and are float32 while a step uses them, so that only what is kept between steps is rounded.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Params, Tree
from functional_sd3.parallel.mesh import Mesh, describe
from functional_sd3.parallel.placement import Layout
from functional_sd3.training.optim import blockwise, by_leaf
from functional_sd3.training.optim.adam import AdamState
from functional_sd3.training.optim.compose import chain
from functional_sd3.training.optim.transforms import add_decayed_weights, scale_by_learning_rate
from functional_sd3.training.optim.types import Optimizer, like, sharded_rule, zero_count
from functional_sd3.training.schedules import Schedule

MIN_SIZE = 4096
"""Leaves with fewer numbers keep float32 moments, as in the code of the paper's authors; here vectors do too."""

WholeShape = Callable[[str, Tensor], tuple[int, ...]]
"""Path and leaf, or this process's part of it -> shape of the whole."""


def scale_by_adam8bit(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, min_size: int = MIN_SIZE) -> Optimizer:
    """The direction of `scale_by_adam` with both moments stored by `blockwise`: a matrix of at least `min_size` numbers
    is {"codes", "scale"} in the state's trees."""
    return _scale_by_adam8bit(b1, b2, eps, lambda path, leaf: tuple(leaf.shape), min_size)


def _scale_by_adam8bit(b1: float, b2: float, eps: float, whole_shape: WholeShape, min_size: int) -> Optimizer:
    def init(params: Params) -> AdamState:
        moments = [_moments(params, whole_shape, min_size, signed) for signed in (True, False)]
        return AdamState(zero_count(params), *moments)

    def update(grads: Tree, state: AdamState, params: Params) -> tuple[Tree, AdamState]:
        count = state.count + 1
        step = by_leaf.AdamStep(count, count, b1, b2, eps, 0.0)
        moments = lambda path: (by_leaf.at(state.mean, path), by_leaf.at(state.square, path))  # noqa: E731
        rows = [by_leaf.adam(grad, *moments(path), step) for path, grad in tree.flatten_paths(grads).items()]
        directions, mean, square = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
        return like(grads, directions), AdamState(count, like(grads, mean), like(grads, square))

    def sharded(layout: Layout, mesh: Mesh) -> Optimizer:
        return _scale_by_adam8bit(b1, b2, eps, _shapes_of(layout, mesh, min_size), min_size)

    return Optimizer(init, update, sharded=sharded)


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
    """`adamw` with moments of one byte a number; its donated form goes through each leaf in parts.

    On parts of leaves it is to the bit what it is on the whole, as the blocks are; `sharded` raises ValueError, naming
    the leaf, where a part cuts a block.
    """
    rule = scale_by_adam8bit(b1, b2, eps, min_size=min_size)
    parts = by_leaf.adamw_rule(rate, b1, b2, eps, decay, mask)

    def whole(rule: Optimizer, sharded: Callable[[Layout, Mesh], Optimizer] | None = None) -> Optimizer:
        pure = chain(rule, add_decayed_weights(decay, mask), scale_by_learning_rate(rate))
        return Optimizer(pure.init, pure.update, by_leaf.donated(parts), by_leaf=parts, sharded=sharded)

    return whole(rule, lambda layout, mesh: whole(sharded_rule(rule, layout, mesh)))


def is_stored(shape: Sequence[int], min_size: int = MIN_SIZE) -> bool:
    """True if the moments of a leaf of this shape are stored in 8 bits."""
    return len(shape) > 1 and math.prod(shape) >= min_size


def _moments(params: Params, whole_shape: WholeShape, min_size: int, signed: bool) -> Tree:
    def stored(path: str, leaf: Tensor) -> Tree:
        shape = whole_shape(path, leaf)
        if not is_stored(shape, min_size):
            return torch.zeros_like(leaf, dtype=torch.float32)
        return blockwise.zeros(leaf.shape, blockwise.row_block(shape), signed=signed, device=leaf.device)

    return tree.map_with_path(stored, params)


def _shapes_of(layout: Layout, mesh: Mesh, min_size: int) -> WholeShape:
    """The shapes of whole leaves. Raises ValueError, naming it, for one of which a part cuts a block."""
    placements = tree.flatten_paths(layout)
    shapes = {path: placement.whole_shape(mesh) for path, placement in placements.items()}
    for path, placement in placements.items():
        whole = shapes[path]
        cuts = [] if placement.dim is None else [(placement.dim, placement.local_shape(mesh))]
        if placement.cut is not None:
            dim, matrices = placement.cut
            cuts.append(
                (dim, tuple(size // matrices if at == dim else size for at, size in enumerate(placement.shape)))
            )
        if is_stored(whole, min_size) and not all(_has_whole_blocks(whole, *each) for each in cuts):
            raise ValueError(
                f"adamw8bit keeps blocks of the rows of {path} {list(whole)}, of which the mesh "
                f"{describe(mesh.sizes)} cuts some: use adamw, or another number of processes"
            )
    return lambda path, leaf: shapes.get(path, tuple(leaf.shape))


def _has_whole_blocks(whole: Sequence[int], dim: int, part: Sequence[int]) -> bool:
    """True if parts of this shape of a leaf, along `dim`, begin and end with blocks."""
    block = blockwise.row_block(whole)
    if block is None:
        return dim == 0 and math.prod(part) % blockwise.BLOCK == 0
    # Within a row a part is one stretch of it where the dimensions before have one index.
    return dim == 0 or (math.prod(whole[1:dim]) == 1 and math.prod(part[dim:]) % block == 0)
