"""Inversion of the flow: from data to the noise that leads to them, and the error of the round trip.

    noise = invert(velocity, x0, times)                      # ode.integrate(ode.EULER, velocity, noise, times) is x0
    trip = round_trip(velocity, x0, times, by=coupled(ode.MIDPOINT))
    trip.error                                               # |data - x0| / |x0| of each sample

Integrating back with the same fixed steps does not return to the start. Three inversions, as values: `plain` integrates
back with the method itself, `corrected` solves each of the method's steps for its start, `coupled` integrates two
copies of the state and is exactly reversible.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.types import Velocity
from functional_sd3.flow import ode
from functional_sd3.flow.ode import fixed_point
from functional_sd3.flow.ode.fixed_point import DEPTH, ITERATIONS, TOLERANCE
from functional_sd3.flow.ode.reversible import COUPLING, reversible
from functional_sd3.flow.per_sample import norm
from functional_sd3.flow.times import Times, checked

STEPS = 50
"""Even steps, where no times are given."""


class Inversion(NamedTuple):
    """A method from data to noise and one back, which invert one another exactly or approximately."""

    there: ode.Method | ode.Adaptive
    """From data to noise."""
    back: ode.Method | ode.Adaptive
    """From noise to data."""
    carries: bool = False
    """True if `back` needs the carry that `there` ended with, not its x alone."""


class RoundTrip(NamedTuple):
    """Result of a round trip, data -> noise -> data."""

    noise: Tensor
    """(batch, ...)"""
    data: Tensor
    """(batch, ...), at best x0 again."""
    error: Tensor
    """|data - x0| / |x0|, Euclidean norms of each sample, (batch,)."""


def plain(method: ode.Method | ode.Adaptive) -> Inversion:
    """The method on the reversed grid. The error of the round trip is the method's: for Euler about a step, for an
    adaptive method about its tolerance."""
    return Inversion(method, method)


def corrected(
    method: ode.Method = ode.EULER,
    *,
    iterations: int = ITERATIONS,
    tolerance: float | None = TOLERANCE,
    depth: int = DEPTH,
) -> Inversion:
    """Fixed-point inversion of each step of the method; options and errors as of `fixed_point.inverse`.

    The result is ordinary noise, from which the method itself leads to x0.
    """
    inverse = fixed_point.inverse(method, iterations=iterations, tolerance=tolerance, depth=depth)
    return Inversion(inverse, method)


def coupled(method: ode.Method = ode.MIDPOINT, coupling: float = COUPLING) -> Inversion:
    """Reversible coupling of two copies of the state: exact up to rounding, two steps of the method a step."""
    return Inversion(*reversible(method, coupling), carries=True)


def invert(
    velocity: Velocity,
    x0: Tensor,
    times: Times | None = None,
    *,
    method: ode.Method | ode.Adaptive | Inversion = ode.EULER,
    iterations: int = ITERATIONS,
    tolerance: float | None = TOLERANCE,
    **options: Any,
) -> Tensor:
    """Noise from which `ode.integrate(method, velocity, noise, times)` leads to x0, (batch, ...) like x0.

    velocity: as for `ode.integrate`. times: the grid of that run, (n + 1,) or (n + 1, batch), in either direction; by
    default 50 even steps from 1 to 0.
    method: of one step, which is inverted by `corrected` with these iterations and this tolerance; an adaptive one,
    which integrates back; or an `Inversion` (of `coupled`, x alone is only half of the state that leads back exactly).
    options: of `ode.run`: on_step, check.

    Raises ValueError for methods that cannot be inverted, and `fixed_point.InversionFailed` where no start of a step
    is found. Works under vmap, grad and compile where the method does; then the tolerance is not checked.
    """
    pair = _pair(method, iterations, tolerance)
    return _there(pair, velocity, x0, upwards(times, x0), **options).x


def round_trip(
    velocity: Velocity, x0: Tensor, times: Times | None = None, *, by: Inversion | None = None, **options: Any
) -> RoundTrip:
    """Round trip of x0 to noise and back by an inversion (`corrected` Euler by default), and its relative error.

    times, options and errors as of `invert`.
    """
    pair = by or corrected()
    grid = upwards(times, x0)
    end = _there(pair, velocity, x0, grid, **options)
    start = end if pair.carries else ode.start(pair.back, end.x, grid[-1])
    data = ode.run(pair.back, velocity, start, grid.flip(0), **options).x
    return RoundTrip(end.x, data, norm(data - x0) / norm(x0.to(data.dtype)))


def upwards(times: Times | None, x: Tensor) -> Tensor:
    """Ascending grid from data to noise: `times`, which may ascend or descend; None for `STEPS` even steps."""
    grid = checked(torch.linspace(0, 1, STEPS + 1, dtype=torch.float32, device="cpu") if times is None else times, x)
    # Without reading a value: the grid may be traced, or on a device.
    return torch.where(grid[0] > grid[-1], grid.flip(0), grid)


def _pair(method: Any, iterations: int, tolerance: float | None) -> Inversion:
    if isinstance(method, Inversion):
        return method
    if isinstance(method, ode.Adaptive):
        return plain(method)
    return corrected(method, iterations=iterations, tolerance=tolerance)


def _there(pair: Inversion, velocity: Velocity, x0: Tensor, grid: Tensor, **options: Any) -> ode.State:
    return ode.run(pair.there, velocity, ode.start(pair.there, x0, grid[0]), grid, **options)
