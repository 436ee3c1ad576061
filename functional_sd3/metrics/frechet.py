"""Frechet distance between two sets of features, from statistics that merge over batches and machines.

Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", equation 6: with means m and covariances C
(of N - 1) of both sets, |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)). All in float64: float32 is off by 0.2 %
and more where there are fewer samples than dimensions.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 4096


class Statistics(NamedTuple):
    """Sufficient statistics of `n` feature vectors: their mean (d,) and M2 (d, d), the sum of the outer products of the
    deviations from it; both float64. The covariance is m2 / (n - 1)."""

    n: int
    mean: Tensor
    m2: Tensor


class FewSamples(UserWarning):
    """The distance is biased upwards by about 1 / N, visibly so below twice as many samples as dimensions."""


def statistics(features: Tensor) -> Statistics:
    """Statistics of features (n, d) of any floating dtype, on their device; n may be 0, which `merge` ignores.

    Raises ValueError for another shape or for integers.
    """
    _check_features("features", features)
    n, width = features.shape
    mean = torch.zeros(width, dtype=torch.float64, device=features.device)
    for rows in features.split(_ROWS):
        mean = mean + rows.double().sum(0) / max(n, 1)
    m2 = torch.zeros(width, width, dtype=torch.float64, device=features.device)
    for rows in features.split(_ROWS):
        centred = rows.double() - mean
        m2 = torch.addmm(m2, centred.T, centred)
    return Statistics(n, mean, m2)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of both sets together (Chan et al. 1979, "Updating Formulae", equation 2.1): any split of a set, in
    any order, gives those of the whole up to rounding. Raises ValueError where their dimensions differ."""
    _check_alike(a, b)
    n = a.n + b.n
    share_a, share_b = a.n / max(n, 1), b.n / max(n, 1)
    offset = b.mean - a.mean
    m2 = a.m2 + b.m2 + torch.outer(offset, offset) * (share_a * b.n)
    return Statistics(n, a.mean * share_a + b.mean * share_b, m2)


def covariance(statistics: Statistics) -> Tensor:
    """The unbiased covariance (d, d). Raises ValueError below two samples."""
    if statistics.n < 2:
        raise ValueError(f"{statistics.n} samples have no covariance; at least 2 are needed")
    return statistics.m2 / (statistics.n - 1)


def distance(a: Statistics, b: Statistics) -> float:
    """The squared Frechet distance, at least 0; for features of `inception.apply` at 2048, the FID.

    Symmetric; 0 for equal statistics up to rounding. Warns (`FewSamples`) below 2 d samples; scores of different n do
    not compare. Raises ValueError where the dimensions differ, below two samples, and for NaN or infinity.
    """
    _check_alike(a, b)
    for values in (a, b):
        covariance(values)
        if not (values.mean.isfinite().all() and values.m2.isfinite().all()):
            raise ValueError(f"the statistics of {values.n} samples hold NaN or infinity, from its features")
    width = len(a.mean)
    if min(a.n, b.n) < 2 * width:
        warnings.warn(few_samples(a.n, b.n, width), FewSamples, stacklevel=2)
    trace = root_trace(covariance(a), covariance(b), rank_a=a.n - 1, rank_b=b.n - 1)
    spread = a.m2.trace() / (a.n - 1) + b.m2.trace() / (b.n - 1)
    # Rounding may leave equal sets a little below 0.
    return max(0.0, float((a.mean - b.mean).square().sum() + spread - 2 * trace))


def root_trace(a: Tensor, b: Tensor, *, rank_a: int | None = None, rank_b: int | None = None) -> Tensor:
    """tr((A B)^(1/2)) of two symmetric positive semidefinite matrices (d, d): a scalar.

    With A = F F^T it is the sum of the square roots of the eigenvalues of F^T B F, which is symmetric: real numbers
    throughout, and a tenth of the time of the matrix square root. rank_a, rank_b: at most so many eigenvalues are not 0
    (samples less one); the others, which are rounding errors, are left out. Differentiable where both are definite.
    """
    ranks = sorted((rank, index) for index, rank in enumerate((rank_a, rank_b)) if rank is not None)
    if ranks and ranks[0][1] == 1:
        a, b = b, a
    rank = min([len(a), *(rank for rank, _ in ranks)])
    factor = _factor(a, rank)
    values = torch.linalg.eigvalsh(factor.T @ b @ factor)
    return values.clamp(min=0).sqrt().sum()


def few_samples(n: int, m: int, width: int) -> str:
    """Text of the warning of a score of too few samples."""
    return (
        f"N = {n} and {m} samples are few for {width} dimensions: the distance is biased upwards by about 1 / N; "
        f"draw at least {2 * width}, and compare only scores of equal N"
    )


def _factor(matrix: Tensor, rank: int) -> Tensor:
    """F (d, rank or d) with F F^T = matrix."""
    if rank == len(matrix):
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return factor
    values, vectors = torch.linalg.eigh(matrix)
    largest = slice(len(values) - rank, None)
    return vectors[:, largest] * values[largest].clamp(min=0).sqrt()


def _check_features(name: str, features: Tensor) -> None:
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"{name} are {features.dtype} {list(features.shape)}; they must be floating, (samples, d)")


def _check_alike(a: Statistics, b: Statistics) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of {len(a.mean)} and of {len(b.mean)} dimensions cannot be put together")
