"""CMMD: the maximum mean discrepancy of CLIP embeddings under a Gaussian kernel.

Jayasumana et al. 2024, "Rethinking FID: Towards a Better Evaluation Metric for Image Generation", section 4. Published
scores use the image embeddings of CLIP ViT-L/14 at 336 pixels.
"""

import torch
from torch import Tensor

SIGMA = 10.0
SCALE = 1000.0

_ROWS = 1024


def distance(x: Tensor, y: Tensor) -> float:
    """CMMD of image embeddings x (n, d) and y (m, d), which are first scaled to length 1.

    The biased estimate, which includes the pairs of each sample with itself, as in the authors' code: at least 0, and 0
    for equal sets. Raises ValueError for dimensions that differ, an empty set, integers, or an embedding without
    direction.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not min(len(x), len(y)):
        raise ValueError(f"embeddings {list(x.shape)} and {list(y.shape)} must be (n, d) and (m, d), not empty")
    if not (x.is_floating_point() and y.is_floating_point()):
        raise ValueError(f"embeddings of dtype {x.dtype} and {y.dtype} must be floating")
    # Rounding may leave equal sets a little below 0.
    return SCALE * max(0.0, float(squared(_unit("x", x), _unit("y", y))))


def squared(x: Tensor, y: Tensor, *, sigma: float = SIGMA) -> Tensor:
    """The biased squared discrepancy of x (n, d) and y (m, d) for k(a, b) = exp(-|a - b|^2 / (2 sigma^2)), a float64
    scalar. Memory grows with n + m, not with their product."""
    x, y = x.double(), y.double()
    # The kernel of near points is near 1 and its sums nearly cancel, so k - 1 is summed instead: the ones cancel
    # exactly.
    return _mean_less_one(x, x, sigma) + _mean_less_one(y, y, sigma) - 2 * _mean_less_one(x, y, sigma)


def _mean_less_one(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """The mean of k(a, b) - 1 over all pairs, in blocks."""
    sums = []
    for rows in x.split(_ROWS):
        for columns in y.split(_ROWS):
            squared_distances = rows.square().sum(1)[:, None] + columns.square().sum(1) - 2 * rows @ columns.T
            sums.append(torch.expm1(-squared_distances / (2 * sigma**2)).sum())
    return torch.stack(sums).sum() / (len(x) * len(y))


def _unit(name: str, embeddings: Tensor) -> Tensor:
    lengths = embeddings.double().norm(dim=1, keepdim=True)
    if not (lengths.isfinite() & (lengths > 0)).all():
        raise ValueError(f"an embedding of {name} is 0, NaN or infinite and has no direction")
    return embeddings.double() / lengths
