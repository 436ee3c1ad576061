"""Velocity fields whose flows are known, for scalar t and for a t of each sample."""

import math

import torch

from functional_sd3.core import prng
from functional_sd3.flow.path import broadcast

ROTATION = torch.tensor([[0.0, -2.0], [2.0, 0.0]], dtype=torch.float64)
LINEAR = torch.tensor([[-0.4, 1.0], [0.3, 0.8]], dtype=torch.float64)
MEAN, STD = 0.7, 0.4


def linear_field(matrix):
    """A velocity whose flow is known: dx/dt = (1 + t) A x has x(t) = exp((t + t^2 / 2 - 3/2) A) x(1)."""
    return (
        lambda x, t: broadcast(1 + t, x) * (x @ matrix.T),
        lambda x, t: x @ torch.linalg.matrix_exp((t + t**2 / 2 - 1.5) * matrix).T,
    )


def gaussian_field(x, t):
    """The exact velocity from N(0, 1) at t = 1 to N(MEAN, STD^2) at t = 0: x_t ~ N((1 - t) MEAN, s^2),
    s^2 = (1 - t)^2 STD^2 + t^2, and dx/dt = -MEAN + (s' / s) (x - (1 - t) MEAN)."""
    t = broadcast(t, x)
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def gaussian_flow(x, t):
    return (1 - t) * MEAN + math.sqrt((1 - t) ** 2 * STD**2 + t**2) * x


FLOWS = {
    "linear": linear_field(LINEAR),
    "rotation": linear_field(ROTATION),
    "gaussian": (gaussian_field, gaussian_flow),
}


def noise(shape=(3, 2), dtype=torch.float64, seed=0):
    return prng.normal(prng.key(seed), shape, dtype)


def field(x, t):
    return torch.tanh(x) * broadcast(1 + t, x) - 0.3 * x.roll(1, -1)
