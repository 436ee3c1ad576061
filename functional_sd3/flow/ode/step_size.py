"""Step-size control: the norm of a step's error, the length of the next step and of the first.

Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", section II.4; the PI controller of Gustafsson
1991 with the constants of Hairer's DOPRI5. All of it is per sample, (batch,), and none of it is differentiated: a
derivative of the solution takes the steps as given.
"""

import torch
from torch import Tensor

from functional_sd3.core.types import Velocity
from functional_sd3.flow.evaluation import evaluate
from functional_sd3.flow.ode.embedded import Adaptive
from functional_sd3.flow.path import broadcast


def norm(values: Tensor, x: Tensor, x_next: Tensor, method: Adaptive) -> Tensor:
    """Root of the mean of (values / (atol + rtol max(|x|, |x_next|)))^2 over the elements of a sample, (batch,)."""
    values, x, x_next = values.detach(), x.detach(), x_next.detach()
    scale = broadcast(method.atol, x) + broadcast(method.rtol, x) * torch.maximum(x.abs(), x_next.abs())
    return (values / scale).reshape(len(x), -1).square().mean(1).sqrt()


def factor(method: Adaptive, error: Tensor, last: Tensor, retrying: Tensor) -> Tensor:
    """Factor from the length of a step of this error to the next, (batch,).

    Accepted: safety error^-(1/q - 3 beta / 4) last^beta, `last` the error of the accepted step before, within
    [min_factor, max_factor], and at most 1 when the attempt before was rejected. Rejected: safety error^-(1/q), and
    `min_factor` where the error is not finite.
    """
    control, q = method.control, method.estimate
    beta = control.beta_q / q
    error, last = error.clamp(min=1e-10), last.clamp(min=1e-4)
    grown = (control.safety * error ** (0.75 * beta - 1 / q) * last**beta).clamp(control.min_factor, control.max_factor)
    grown = torch.where(retrying, grown.clamp(max=1.0), grown)
    shrunk = (control.safety * error ** (-1 / q)).clamp(control.min_factor, 1.0)
    return torch.where(error <= 1, grown, torch.where(torch.isfinite(error), shrunk, control.min_factor))


def first(method: Adaptive, velocity: Velocity, x: Tensor, t: Tensor, end: Tensor, slope: Tensor) -> Tensor:
    """Length of the first step, (batch,) and positive, from one evaluation of the velocity.

    Such that h^q max(|v|, |dv/dt|)^q is about 0.01 in the norm of the tolerances (Hairer et al., page 169).
    """
    x, t, end, slope = x.detach(), t.detach(), end.detach(), slope.detach()
    distance = (end - t).abs()
    size, speed = norm(x, x, x, method), norm(slope, x, x, method)
    trial = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed.clamp(min=1e-5))
    trial = torch.minimum(trial, distance)
    # The exact end: rounding must not move the time out of [0, 1].
    h = torch.where(trial < distance, torch.copysign(trial, end - t), end - t)
    next_slope = evaluate(velocity, x + broadcast(h, x) * slope, torch.where(trial < distance, t + h, end)).detach()
    acceleration = norm(next_slope - slope, x, x, method) / trial.clamp(min=torch.finfo(x.dtype).tiny)
    steepest = torch.maximum(speed, acceleration)
    length = torch.where(
        steepest <= 1e-15, (1e-3 * trial).clamp(min=1e-6), (0.01 / steepest.clamp(min=1e-15)) ** (1 / method.estimate)
    )
    return torch.minimum(torch.minimum(100 * trial, length), distance)


def smallest(x: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """Least step length, below which the time is lost to rounding, (batch,)."""
    return 4 * torch.finfo(x.dtype).eps * torch.maximum(t.abs(), end.abs()).detach()
