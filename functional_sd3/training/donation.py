"""Checks of memory that a step updates in place, and invalidation of donated trees."""

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Tree


def check_donated(trees: Tree) -> None:
    """Raises ValueError, naming the paths, where leaves share memory or require grad."""
    flat = tree.flatten_paths(trees)
    for path, leaf in flat.items():
        if leaf.requires_grad:
            raise ValueError(f"{path} requires grad, so a graph may still read it; donate detached leaves")
    if pair := _overlap(flat):
        raise ValueError(f"{pair[0]} and {pair[1]} share memory; clone one of them before donating")


def overlapping(trees: Tree) -> tuple[str, str] | None:
    """The paths of two leaves that overlap in memory; None if there are none."""
    return _overlap(tree.flatten_paths(trees))


def _overlap(flat: dict[str, Tensor]) -> tuple[str, str] | None:
    spans = []
    for path, leaf in flat.items():
        if leaf.numel():
            extent = leaf.numel()
            if not leaf.is_contiguous():
                extent = 1 + sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True))
            spans.append((leaf.data_ptr(), leaf.data_ptr() + extent * leaf.element_size(), path))
    spans.sort()
    for (_, end, path), (start, _, other) in zip(spans, spans[1:], strict=False):
        if start < end:
            return path, other
    return None


def poison(tensors: Tree) -> Tree:
    """The same tensors as new objects; the old objects are emptied, so that using a donated tree fails at once."""

    def move(leaf: Tensor) -> Tensor:
        moved = leaf.detach()
        leaf.set_(torch.empty(0, dtype=leaf.dtype, device=leaf.device))  # type: ignore[call-overload]
        return moved

    return tree.map(move, tensors)


def check_strides(paths: list[str], weights: dict[str, Tensor], *moments: dict[str, Tensor]) -> None:
    """Raises ValueError, naming the path, unless each weight is dense and its moments have its strides."""
    for path in paths:
        strides = weights[path].stride()
        if strides != torch.empty_like(weights[path]).stride() or any(
            moment[path].stride() != strides for moment in moments
        ):
            raise ValueError(f"{path} has gaps in memory, or another order than its moments; make both contiguous")


def with_strides_of(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` with the strides of `like`; copied only if they differ."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)
