"""Rectified-flow path between data and noise, its velocity target and loss, and densities of training times.

Rectified flow (Liu et al. 2022, arXiv:2209.03003) as used by Esser et al. 2024, arXiv:2403.03206, sections 2 and 3:
x_t = (1 - t) x_0 + t noise, so t = 1 is noise, t = 0 is data, and dx_t/dt = noise - x_0.
"""

import math
from typing import overload

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key, Velocity


@overload
def broadcast(t: Tensor, x: Tensor) -> Tensor: ...
@overload
def broadcast(t: Tensor | float, x: Tensor) -> Tensor | float: ...


def broadcast(t: Tensor | float, x: Tensor) -> Tensor | float:
    """`t`, a scalar or (batch,), shaped so that it multiplies `x` (batch, ...) sample by sample."""
    if isinstance(t, Tensor) and 0 < t.ndim < x.ndim:
        return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
    return t


def interpolate(x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """x_t = (1 - t) x_0 + t noise. x0, noise (batch, ...); t in [0, 1], a scalar or (batch,)."""
    t = broadcast(t, x0)
    return (1 - t) * x0 + t * noise


def target(x0: Tensor, noise: Tensor) -> Tensor:
    """dx_t/dt = noise - x_0 (batch, ...), the target of the velocity network; the same at every t."""
    return noise - x0


def denoised(x: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
    """The data end of the straight line through `x` (at time `t`) along `velocity`: x_0 = x - t v."""
    return x - broadcast(t, x) * velocity


def noise_of(x: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
    """The noise end of the straight line through `x` (at time `t`) along `velocity`: noise = x + (1 - t) v."""
    return x + (1 - broadcast(t, x)) * velocity


def velocity_of(x: Tensor, x0: Tensor, t: Tensor | float) -> Tensor:
    """The velocity of the line from a predicted `x0` through `x` at time `t` > 0: v = (x - x_0) / t."""
    return (x - x0) / broadcast(t, x)


def loss(
    velocity: Velocity, x0: Tensor, noise: Tensor, t: Tensor, weight: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Rectified-flow loss of each sample: mean over its elements of (v(x_t, t) - (noise - x_0))^2, float32 (batch,).

    velocity: called once, with x_t in float32 (float64 if x0 is) and `t`; may return any float dtype.
    x0, noise (batch, ...); t (batch,) in [0, 1]. weight: None for 1, else a scalar or (batch,), e.g. w(t)
    (`loss_weights`). Times that were drawn from a density have its weight already: 1 / density as `weight` would undo
    it. mask: None for 1, else a factor of each element's square, of a shape that broadcasts to x0's.
    Raises ValueError when the shapes of x0 and noise, or of x0 and the velocity, differ.
    """
    if x0.shape != noise.shape:
        raise ValueError(f"x0 {tuple(x0.shape)} and noise {tuple(noise.shape)} must have the same shape")
    working = torch.promote_types(x0.dtype, torch.float32)
    x0, noise = x0.to(working), noise.to(working)
    predicted = velocity(interpolate(x0, noise, t), t)
    if predicted.shape != x0.shape:
        raise ValueError(f"the velocity has shape {tuple(predicted.shape)}, not that of x0, {tuple(x0.shape)}")
    squares = (predicted.to(working) - target(x0, noise)).square()
    squares = (squares if mask is None else mask * squares).flatten(1).mean(1)
    return squares if weight is None else weight * squares


# Densities of t. Each function draws float32 times of the given shape from one key. `schedule.shift(t, s)` moves them
# towards noise, as the released models were trained; for a logit-normal that equals mean + log(s).


def uniform(key: Key, shape: tuple[int, ...]) -> Tensor:
    """t ~ U[0, 1)."""
    return prng.uniform(key, shape)


def logit_normal(key: Key, shape: tuple[int, ...], mean: float | Tensor = 0.0, std: float | Tensor = 1.0) -> Tensor:
    """t = sigmoid(n), n ~ N(mean, std^2) (Esser et al. 2024, eq. 19; mean 0, std 1 trained Stable Diffusion 3).

    A larger mean is more noise, as in the paper. diffusers' scripts look the draw up in a descending table, so their
    `logit_mean` has the opposite sign.
    """
    return torch.sigmoid(mean + std * prng.normal(key, shape))


def mode(key: Key, shape: tuple[int, ...], scale: float | Tensor = 1.29) -> Tensor:
    """t = 1 - u - scale (cos^2(pi u / 2) - 1 + u), u ~ U[0, 1): heavy in the middle for scale > 0, at the ends for < 0.

    Esser et al. 2024, eq. 20, monotone for -1 <= scale <= 2 / (pi - 2) = 1.752; scale 0 is uniform.
    """
    if not isinstance(scale, Tensor) and not -1 <= scale <= 2 / (math.pi - 2):
        raise ValueError(f"mode scale {scale} must be between -1 and 2 / (pi - 2) = 1.752")
    u = prng.uniform(key, shape)
    return 1 - u - scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)


def cosine_map(key: Key, shape: tuple[int, ...]) -> Tensor:
    """t = 1 - 1 / (tan(pi u / 2) + 1), u ~ U[0, 1): the log-SNR of the cosine schedule (Esser et al. 2024, eq. 21)."""
    # The same quotient without the pole of tan at u = 1.
    angle = math.pi / 2 * prng.uniform(key, shape)
    return torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))


def logit_normal_log_density(t: Tensor, mean: float | Tensor = 0.0, std: float | Tensor = 1.0) -> Tensor:
    """log p(t) of `logit_normal` for t in (0, 1); -inf at the ends. Its exp is the weight of uniform times instead."""
    score = (torch.logit(t) - mean) / std
    scale = torch.log(std) if isinstance(std, Tensor) else math.log(std)
    inside = -0.5 * score.square() - scale - 0.5 * math.log(2 * math.pi) - torch.log(t) - torch.log1p(-t)
    return torch.where((t > 0) & (t < 1), inside, -torch.inf)
