"""Dense output: the solution between the ends of a step, a polynomial in theta = (s - t) / h for each sample.

It costs no evaluation of the velocity. Its error is that of the step for Bogacki and Shampine's pair (order 3), and
one order less than the solution's for the pairs of order 5 (order 4).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.flow.ode.embedded import Adaptive
from functional_sd3.flow.ode.runge_kutta import combine
from functional_sd3.flow.path import broadcast


class Piece(NamedTuple):
    """One step: x(t + theta (t_next - t)) = sum_k coefficients[k] theta^k."""

    t: Tensor
    """(batch,)"""
    t_next: Tensor
    """(batch,); equal to t where the sample took no step."""
    coefficients: list[Tensor]
    """Each (batch, ...), the lowest power first."""


def piece(method: Adaptive, x: Tensor, slopes: Sequence[Tensor], t: Tensor, t_next: Tensor) -> Piece:
    """The polynomial of a step from x with these stage slopes."""
    h = broadcast(t_next - t, x)
    powers = zip(*method.interpolant, strict=True)
    return Piece(t, t_next, [x, *(h * combine(weights, slopes) for weights in powers)])


def value(step: Piece, t: Tensor) -> Tensor:
    """x at t (..., batch): (..., batch, ...). For a t outside the step, x at the end that is nearer."""
    length = step.t_next - step.t
    theta = ((t - step.t) / torch.where(length == 0, 1.0, length)).clamp(0, 1)
    x = step.coefficients[0]
    theta = theta.reshape(theta.shape + (1,) * (x.ndim - 1))
    total = step.coefficients[-1]
    for coefficient in reversed(step.coefficients[:-1]):
        total = coefficient + theta * total
    return total


def is_inside(step: Piece, t: Tensor) -> Tensor:
    """True for the times t (..., batch) after the start of the step and up to its end."""
    ascending = (step.t < t) & (t <= step.t_next)
    descending = (step.t_next <= t) & (t < step.t)
    return ascending | descending


def evaluate(steps: Sequence[Piece], t: Tensor | float) -> Tensor:
    """x at t, a number or (batch,), of a whole solution: (batch, ...); NaN before its start and beyond its end."""
    start = steps[0].coefficients[0]
    t = torch.as_tensor(t, dtype=start.dtype, device=start.device).expand(len(start))
    x = torch.where(broadcast(t == steps[0].t, start), start, torch.nan)
    for step in steps:
        x = torch.where(broadcast(is_inside(step, t), x), value(step, t), x)
    return x
