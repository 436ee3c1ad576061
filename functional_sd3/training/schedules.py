"""Schedules: a learning rate or another value as a function of the number of steps done."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Schedule = Callable[[Tensor], Tensor]
"""Number of steps done (integer tensor ()) -> value (float32 tensor ())."""


def as_schedule(value: float | Schedule) -> Schedule:
    """A number as the constant schedule; a schedule as it is."""
    return value if callable(value) else constant(value)


def constant(value: float) -> Schedule:
    """`value` at every step."""
    return lambda step: torch.full((), value, device=step.device, dtype=torch.float32)


def warmup_constant(peak: float, warmup: int) -> Schedule:
    """Linear warm-up to `peak` over the first `warmup` steps (not 0 at the first), then `peak`."""
    return lambda step: peak * _rise(step, warmup)


def warmup_cosine(peak: float, warmup: int, total: int, floor: float = 0.0) -> Schedule:
    """`warmup_constant` times half a cosine, from 1 at the end of the warm-up to `floor` (a value) at `total`."""
    _check_span(warmup, total)

    def schedule(step: Tensor) -> Tensor:
        done = ((step - warmup).float() / (total - warmup)).clamp(0.0, 1.0)
        fall = floor + (peak - floor) * (1 + torch.cos(math.pi * done)) / 2
        return torch.where(step < warmup, peak * _rise(step, warmup), fall)

    return schedule


def trapezoid(peak: float, warmup: int, total: int, decay: int | None = None, floor: float = 0.0) -> Schedule:
    """Linear warm-up over `warmup` steps, constant, then linear decay to `floor` over the last `decay` (None: all the
    others)."""
    _check_span(warmup, total)
    decay = total - warmup if decay is None else decay
    if not 0 < decay <= total - warmup:
        raise ValueError(f"decay {decay} must be between 1 and total - warmup = {total - warmup}")

    def schedule(step: Tensor) -> Tensor:
        left = ((total - step).float() / decay).clamp(0.0, 1.0)
        return torch.where(step < warmup, peak * _rise(step, warmup), floor + (peak - floor) * left)

    return schedule


def _check_span(warmup: int, total: int) -> None:
    if not 0 <= warmup < total:
        raise ValueError(f"warmup {warmup} must be at least 0 and below total {total}")


def _rise(step: Tensor, warmup: int) -> Tensor:
    return ((step + 1).float() / max(warmup, 1)).clamp(max=1.0)
