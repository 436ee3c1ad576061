"""Arithmetic of each sample of a batch by itself: (batch, ...) -> (batch,)."""

from torch import Tensor


def dot(first: Tensor, second: Tensor) -> Tensor:
    """Inner product <first, second> over a sample's elements, (batch,)."""
    return (first * second).reshape(len(first), -1).sum(1)


def norm(x: Tensor) -> Tensor:
    """Euclidean norm over a sample's elements, (batch,)."""
    return x.reshape(len(x), -1).norm(dim=1)
