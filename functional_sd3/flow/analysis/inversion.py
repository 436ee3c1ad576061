"""Inversion of the flow: from data to the noise that it starts from, and the error of the round trip.

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
    """A method from data to noise and one from noise to data, exactly or approximately inverse to one another."""

    to_noise: ode.Method | ode.Adaptive
    to_data: ode.Method | ode.Adaptive
    has_carry: bool = False
    """True if `to_data` starts from the carry that `to_noise` ended with, not from its x alone."""


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
    """Fixed-point inversion of each step of the method; options and errors as in `fixed_point.inverse`.

    The result is ordinary noise, from which a run of the method itself ends at x0.
    """
    inverse = fixed_point.inverse(method, iterations=iterations, tolerance=tolerance, depth=depth)
    return Inversion(inverse, method)


def coupled(method: ode.Method = ode.MIDPOINT, coupling: float = COUPLING) -> Inversion:
    """Reversible coupling of two copies of the state: exact up to rounding, two steps of the method a step."""
    return Inversion(*reversible(method, coupling), has_carry=True)


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
    """Noise from which `ode.integrate(method, velocity, noise, times)` ends at x0, (batch, ...) like x0.

    velocity: as for `ode.integrate`. times: the grid of that run, (n + 1,) or (n + 1, batch), in either direction; by
    default 50 even steps from 1 to 0.
    method: of one step, which is inverted by `corrected` with these iterations and this tolerance; an adaptive one,
    which integrates back; or an `Inversion` (x alone is only half of the state of `coupled`, so not exact).
    options: of `ode.run`: on_step, check.

    Raises ValueError for methods that cannot be inverted, and `fixed_point.InversionFailed` where the iteration of a
    step does not converge. Works under vmap, grad and compile where the method does; then the tolerance is not checked.
    """
    inversion = _inversion(method, iterations, tolerance)
    return _to_noise(inversion, velocity, x0, ascending(times, x0), **options).x


def round_trip(
    velocity: Velocity, x0: Tensor, times: Times | None = None, *, by: Inversion | None = None, **options: Any
) -> RoundTrip:
    """Round trip of x0 to noise and back by an inversion (`corrected` Euler by default), and its relative error.

    times, options and errors as in `invert`.
    """
    inversion = by or corrected()
    grid = ascending(times, x0)
    end = _to_noise(inversion, velocity, x0, grid, **options)
    start = end if inversion.has_carry else ode.start(inversion.to_data, end.x, grid[-1])
    data = ode.run(inversion.to_data, velocity, start, grid.flip(0), **options).x
    return RoundTrip(end.x, data, norm(data - x0) / norm(x0.to(data.dtype)))


def ascending(times: Times | None, x: Tensor) -> Tensor:
    """Ascending grid from data to noise: `times`, which may ascend or descend; None for `STEPS` even steps."""
    grid = checked(torch.linspace(0, 1, STEPS + 1, dtype=torch.float32, device="cpu") if times is None else times, x)
    # Without reading a value: the grid may be traced, or on a device.
    return torch.where(grid[0] > grid[-1], grid.flip(0), grid)


def _inversion(method: Any, iterations: int, tolerance: float | None) -> Inversion:
    if isinstance(method, Inversion):
        return method
    if isinstance(method, ode.Adaptive):
        return plain(method)
    return corrected(method, iterations=iterations, tolerance=tolerance)


def _to_noise(inversion: Inversion, velocity: Velocity, x0: Tensor, grid: Tensor, **options: Any) -> ode.State:
    return ode.run(inversion.to_noise, velocity, ode.start(inversion.to_noise, x0, grid[0]), grid, **options)
