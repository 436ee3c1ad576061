"""Spacings of noise levels: float64 (steps,) from `highest`, the first, down to `lowest`, the last before 0."""

import math

import numpy as np
import torch
from torch import Tensor

Scalar = float | Tensor


def linear(steps: int, lowest: Scalar, highest: Scalar = 1.0) -> Tensor:
    """Evenly spaced."""
    device = next((end.device for end in (lowest, highest) if isinstance(end, Tensor)), "cpu")
    ramp = torch.arange(steps, dtype=torch.float64, device=device) / max(steps - 1, 1)
    return highest + ramp * (lowest - highest)


def karras(steps: int, lowest: Scalar, highest: Scalar = 1.0, rho: Scalar = 7.0) -> Tensor:
    """Evenly spaced in sigma^(1/rho) (Karras et al. 2022, arXiv:2206.00364, eq. 5). lowest > 0."""
    return linear(steps, lowest ** (1 / rho), highest ** (1 / rho)) ** rho


def exponential(steps: int, lowest: Scalar, highest: Scalar = 1.0) -> Tensor:
    """Evenly spaced in log(sigma). lowest > 0."""
    return torch.exp(linear(steps, _log(lowest), _log(highest)))


def beta(steps: int, lowest: Scalar, highest: Scalar = 1.0, a: float = 0.6, b: float = 0.6) -> Tensor:
    """Even quantiles of Beta(a, b) (Lee et al. 2024, arXiv:2407.12173). Differentiable in the ends, not in a, b."""
    from scipy.stats import beta as distribution

    quantiles = torch.from_numpy(distribution.ppf(1 - np.linspace(0, 1, steps), a, b))
    quantiles = quantiles.to(lowest.device if isinstance(lowest, Tensor) else None)
    return lowest + quantiles * (highest - lowest)


def _log(value: Scalar) -> Scalar:
    return torch.log(value) if isinstance(value, Tensor) else math.log(value)
