"""Step windows and per-step scales of guidance."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Window = Callable[[int, int], bool]
"""`(step, steps)` -> True if a step of a run, 0 the first, is inside."""


def fraction(start: float, stop: float) -> Window:
    """Window floor(start steps) <= step < floor(stop steps), the rule of diffusers' guiders.

    Products within rounding of a whole number count as it: 0.29 of 100 steps are 29, where diffusers has 28.
    """
    check_fractions(start, stop)

    def whole_steps(part: float, steps: int) -> int:
        return math.floor(part * steps + 1e-6)

    return lambda step, steps: whole_steps(start, steps) <= step < whole_steps(stop, steps)


def strictly(start: float, stop: float) -> Window:
    """Window start steps < step < stop steps, as SD3.5's released code has it."""
    check_fractions(start, stop)
    return lambda step, steps: steps * start < step < steps * stop


def check_fractions(start: float, stop: float) -> None:
    """Raises ValueError unless 0 <= start <= stop <= 1."""
    if not 0 <= start <= stop <= 1:
        raise ValueError(
            f"start {start} and stop {stop} of guidance must be 0 <= start <= stop <= 1: fractions of the run"
        )


def step_fractions(times: Tensor, low: float, high: float) -> tuple[float, float]:
    """Fractions (start, stop) of a run whose steps start at times low < t <= high; times (steps + 1,), descending.

    Reads the times. Where x is x_0 + sigma noise, as in Karras et al. 2022, t = sigma / (1 + sigma).
    """
    starts = times[:-1].tolist()
    return sum(t > high for t in starts) / len(starts), sum(t > low for t in starts) / len(starts)


def per_step(scales: Tensor, times: Tensor) -> Callable[[Tensor], Tensor]:
    """A scale for each step of a grid: scales (steps,) or (steps, batch), times (steps + 1,), as a function of t.

    Step i has scales[i] from times[i] on and before times[i + 1], where step i + 1 starts; the last has it to the end.
    Differentiable in the scales. Raises ValueError unless there is one for each step.
    """
    if len(scales) != len(times) - 1:
        raise ValueError(f"{len(scales)} scales for {len(times) - 1} steps; give one for each")

    def scale(t: Tensor) -> Tensor:
        grid = times.to(t.dtype)
        direction = torch.sign(grid[-1] - grid[0])
        step = (direction * grid[1:-1, None] <= (direction * t).reshape(1, -1)).sum(0)
        if t.ndim == 0:
            return scales.index_select(0, step).squeeze(0)
        if scales.ndim == 1:
            return scales.gather(0, step)
        return scales.expand(-1, len(t)).gather(0, step.unsqueeze(0)).squeeze(0)

    return scale
