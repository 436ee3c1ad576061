"""TrigFlow: the rectified flow in an angle, where data and noise are rotated into each other.

Lu and Song 2024, arXiv:2410.11081 (TrigFlow, consistency models of continuous time); Chen et al. 2025, arXiv:2503.09641
(SANA-Sprint, proposition 3.1: the exact transform of a rectified flow). In units of the data's standard deviation,
their sigma_d = 1:

    y_a = cos a x_0 + sin a noise,  dy/da = F(y, a),  a in [0, pi/2], pi/2 = noise
    t = sin a / (sin a + cos a),  x_t = n y_a,  n = 1 / (sin a + cos a) = sqrt(t^2 + (1 - t)^2)
    F = (1 - 2 t) y + n v(x_t, t)

So a function of either flow is one of the other, without approximation, and a network needs no other inputs.
"""

import torch
from torch import Tensor

from functional_sd3.core.types import Velocity
from functional_sd3.flow.path import broadcast


def angle(t: Tensor) -> Tensor:
    """Angle a of the time t in [0, 1], of any shape: tan a = t / (1 - t)."""
    return torch.atan2(t, 1 - t)


def time(a: Tensor) -> Tensor:
    """Time t of the angle a in [0, pi/2], of any shape."""
    return torch.sin(a) * scale(a)


def scale(a: Tensor) -> Tensor:
    """n = x_t / y_a = 1 / (sin a + cos a), from 1 down to 1 / sqrt(2) and up to 1."""
    return 1 / (torch.sin(a) + torch.cos(a))


def from_flow(velocity: Velocity) -> Velocity:
    """F: (y (batch, ...), a) -> dy/da of TrigFlow, from dx/dt of the rectified flow; a is () or (batch,)."""

    def trig_velocity(y: Tensor, a: Tensor) -> Tensor:
        n, t = scale(a), time(a)
        v = velocity(broadcast(n, y) * y, t)
        return broadcast(1 - 2 * t, y) * y + broadcast(n, y) * v

    return trig_velocity


def to_flow(trig_velocity: Velocity) -> Velocity:
    """The inverse of `from_flow`: (x, t) -> dx/dt of the rectified flow, from F."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        a = angle(t)
        n = broadcast(scale(a), x)
        y = x / n
        return (trig_velocity(y, a) - broadcast(1 - 2 * t, x) * y) / n

    return velocity


def consistency(y: Tensor, trig_velocity: Tensor, a: Tensor) -> Tensor:
    """f = cos a y - sin a F, (batch, ...) like y: the end at a = 0 of its arc, equal to `path.denoised`, x_t - t v."""
    a = broadcast(a, y)
    return torch.cos(a) * y - torch.sin(a) * trig_velocity
