"""Kernel inception distance (KID): unbiased squared maximum mean discrepancy of two sets of features.

Binkowski et al. 2018, "Demystifying MMD GANs", section 4; the kernel is k(x, y) = (x . y / d + 1)^3. Computed in
float64, a block of rows at a time.
"""

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key

SUBSETS, SIZE = 100, 1000
"""Numbers that published scores use."""

_ROWS = 1024


def distance(x: Tensor, y: Tensor, key: Key, *, subsets: int = SUBSETS, size: int | None = None) -> float:
    """The mean of `estimates`: the number that is published as KID (some multiply it by 1000).

    x (n, d) and y (m, d) are features (2048 of `inception.apply`). Expected 0 for sets of one distribution, and then as
    often a little below. Errors as for `estimates`.
    """
    return float(estimates(x, y, key, subsets=subsets, size=size).mean())


def estimates(x: Tensor, y: Tensor, key: Key, *, subsets: int = SUBSETS, size: int | None = None) -> Tensor:
    """`unbiased` of `subsets` random subsets of `size` samples from x (n, d) and y (m, d): float64 (subsets,).

    Their standard deviation is published beside the mean. size: None for 1000, or all of the smaller set where
    it has fewer. Raises ValueError when a set has fewer than `size`, or size is below 2.
    """
    _check(x, y)
    size = min(SIZE, len(x), len(y)) if size is None else size
    if not 2 <= size <= min(len(x), len(y)) or subsets < 1:
        raise ValueError(f"{subsets} subsets of {size} cannot be drawn from {len(x)} and {len(y)} samples")
    distances = []
    for key_x, key_y in prng.split(key, (subsets, 2)):
        # Features may be on another device than the key.
        chosen_x = prng.permutation(key_x, len(x))[:size].to(x.device)
        chosen_y = prng.permutation(key_y, len(y))[:size].to(y.device)
        distances.append(unbiased(x[chosen_x], y[chosen_y]))
    return torch.stack(distances)


def unbiased(x: Tensor, y: Tensor) -> Tensor:
    """The squared discrepancy of x (n, d) and y (m, d) estimated from every pair: a float64 scalar, differentiable.

    The mean kernel of distinct pairs within x, and within y, less twice that of pairs between them. Memory grows with
    n + m, not with their product. Raises ValueError below two samples and where the dimensions differ.
    """
    _check(x, y)
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"{n} and {m} samples have no distinct pairs; at least 2 of each are needed")
    x, y = x.double(), y.double()
    within_x = (_total(x, x) - _kernel(x.square().sum(1), x.shape[1]).sum()) / (n * (n - 1))
    within_y = (_total(y, y) - _kernel(y.square().sum(1), y.shape[1]).sum()) / (m * (m - 1))
    return within_x + within_y - 2 * _total(x, y) / (n * m)


def _total(x: Tensor, y: Tensor) -> Tensor:
    """The kernel summed over all pairs."""
    blocks = [(rows, columns) for rows in x.split(_ROWS) for columns in y.split(_ROWS)]
    return torch.stack([_kernel(rows @ columns.T, x.shape[1]).sum() for rows, columns in blocks]).sum()


def _kernel(product: Tensor, width: int) -> Tensor:
    return (product / width + 1) ** 3


def _check(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not x.shape[1]:
        raise ValueError(f"features {list(x.shape)} and {list(y.shape)} must be (n, d) and (m, d)")
    if not (x.is_floating_point() and y.is_floating_point()):
        raise ValueError(f"features of dtype {x.dtype} and {y.dtype} must be floating")
