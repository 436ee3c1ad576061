"""Weights w(t) of the rectified-flow loss: what is multiplied onto the squared error of the velocity at time t.

The path is x_t = (1 - t) x_0 + t noise, so that the errors of the other two predictions are multiples of the
velocity's: data x_0 = x_t - t v gives t^2, noise = x_t + (1 - t) v gives (1 - t)^2, and the signal-to-noise ratio is
SNR(t) = (1 - t)^2 / t^2. A density p(t) of training times and the weight p(t) under uniform times are the same loss.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Weight = Callable[[Tensor], Tensor]
"""w(t) of times t (batch,) in [0, 1]; float32 (batch,)."""
MIN_TIME = 1e-3
"""Times below count as this one in weights with a pole at 0; it is the first level of the models' training tables."""


def data(t: Tensor) -> Tensor:
    """w(t) = t^2: the error of the predicted data, diffusers' `--precondition_outputs 1` for SD3."""
    return t.square()


def noise(t: Tensor) -> Tensor:
    """w(t) = (1 - t)^2: the error of the predicted noise, the loss of DDPM (Ho et al. 2020, eq. 14)."""
    return (1 - t).square()


def sigma_sqrt(t: Tensor) -> Tensor:
    """w(t) = t^-2, `sigma_sqrt` of diffusers' `compute_loss_weighting_for_sd3`; t below 0.001 counts as 0.001."""
    return t.clamp_min(MIN_TIME) ** -2


def cosine_map(t: Tensor) -> Tensor:
    """w(t) = 2 / (pi (1 - 2 t + 2 t^2)), the density of `path.cosine_map` (Esser et al. 2024, section 3.1).

    `cosmap` of diffusers' `compute_loss_weighting_for_sd3`: for uniform times.
    """
    return 2 / (math.pi * (1 - 2 * t + 2 * t.square()))


def min_snr(t: Tensor, gamma: float = 5.0) -> Tensor:
    """w(t) = t^2 min(SNR(t), gamma) = min((1 - t)^2, gamma t^2): Min-SNR-gamma of Hang et al. 2023.

    arXiv:2303.09556, eq. 7: the error of the data is weighted by min(SNR, gamma), equivalently that of the noise by
    min(1, gamma / SNR). Multiples of the velocity's error, both are this. Raises ValueError for gamma <= 0.
    """
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma {gamma} of min-SNR must be a positive number, such as 5")
    return torch.minimum((1 - t).square(), gamma * t.square())


def product(*weights: Weight) -> Weight:
    """w(t) of several weights multiplied."""

    def weight(t: Tensor) -> Tensor:
        value = torch.ones_like(t)
        for each in weights:
            value = value * each(t)
        return value

    return weight
