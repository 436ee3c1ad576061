"""Distances between samples and to the k-th neighbour, shared by precision, recall, density and coverage.

Blocks of rows at a time, so that memory grows with the samples and not with their pairs; float64.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_ROWS = 1024
# Squared distances below this share of the squared lengths are rounding errors of equal points.
_ROUNDING = 1e-14


def blocks(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Euclidean distances from rows of x (n, d) to all of y (m, d): blocks (rows, m), in the order of x."""
    middle = y.double().mean(0)
    y = y.double() - middle
    lengths = y.square().sum(1)
    for part in x.split(_ROWS):
        rows = part.double() - middle
        squared_lengths = rows.square().sum(1)[:, None] + lengths
        squared = squared_lengths - 2 * rows @ y.T
        yield torch.where(squared <= _ROUNDING * squared_lengths, 0.0, squared).sqrt()


def radii(x: Tensor, k: int) -> Tensor:
    """The distance from each of x (n, d) to its k-th nearest other sample: float64 (n,)."""
    # k + 1, as each sample is the nearest neighbour of itself.
    return torch.cat([block.kthvalue(k + 1, 1).values for block in blocks(x, x)])


def check(real: Tensor, generated: Tensor, k: int) -> None:
    """Raises ValueError unless both are finite features (n, d) with more than k samples."""
    for name, features in (("real", real), ("generated", generated)):
        if features.ndim != 2 or not features.is_floating_point():
            raise ValueError(f"{name} features are {features.dtype} {list(features.shape)}, not floating (samples, d)")
        if not features.isfinite().all():
            raise ValueError(f"{name} features hold NaN or infinity")
        if not 1 <= k < len(features):
            raise ValueError(f"{len(features)} {name} samples have no neighbour number {k}")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"real features have {real.shape[1]} dimensions, generated ones {generated.shape[1]}")
