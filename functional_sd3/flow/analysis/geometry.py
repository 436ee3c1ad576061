"""Geometry of trajectories: straightness, curvature, and singular values of the Jacobian of a velocity field.

Results are per sample, (batch,), in the units of x: lengths are Euclidean norms over a sample's elements, not means.
Samples are assumed to be independent. Derivatives are taken in forward mode. Acceleration and curvature need a velocity
that is a function of t, not a table of a run's times. Works under vmap, grad and torch.compile.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vmap

from functional_sd3.core import prng, transform
from functional_sd3.core.types import Key, Velocity
from functional_sd3.flow import ode
from functional_sd3.flow.analysis import spectral
from functional_sd3.flow.evaluation import evaluate
from functional_sd3.flow.path import broadcast
from functional_sd3.flow.times import Times, checked


class Trajectory(NamedTuple):
    """States and velocities of a trajectory at n + 1 times."""

    times: Tensor
    """(n + 1,) or (n + 1, batch)"""
    states: Tensor
    """(n + 1, batch, ...)"""
    slopes: Tensor
    """(n + 1, batch, ...): the velocity there."""


class Singular(NamedTuple):
    """The largest singular values of the Jacobian dv/dx of each sample, and their directions."""

    values: Tensor
    """(batch, count), descending, in units of 1 / time."""
    left: Tensor
    """(count, batch, ...): unit directions of the velocity."""
    right: Tensor
    """(count, batch, ...): unit directions of x; J right = values left."""


def trajectory(method: ode.Method | ode.Adaptive, velocity: Velocity, x: Tensor, times: Times) -> Trajectory:
    """Trajectory from x (batch, ...) at times[0] as `ode.integrate` computes it, with the velocity at each of `times`.

    Costs n + 1 evaluations beside those of the method.
    """
    grid = checked(times, x)
    states = ode.integrate(method, velocity, x, grid, save="all")
    slopes = [evaluate(velocity, state, t) for state, t in zip(states, grid, strict=True)]
    return Trajectory(grid, states, torch.stack(slopes))


def straightness(line: Trajectory) -> Tensor:
    """Straightness: the integral over t of |(x_end - x_start) / (t_end - t_start) - v(x_t, t)|^2, (batch,).

    S(Z) of Liu et al. 2022, arXiv:2209.03003, for a line over [0, 1]: 0 where it is straight and evenly fast, so that
    one Euler step is exact. Squared units of x. By the trapezoidal rule: its error falls with the square of the steps.
    """
    chord = (line.states[-1] - line.states[0]) / broadcast(line.times[-1] - line.times[0], line.states[0])
    squares = (chord - line.slopes).square().flatten(2).sum(2)
    lengths = line.times.diff(dim=0).abs()
    lengths = lengths[:, None] if lengths.ndim == 1 else lengths
    return (lengths * (squares[1:] + squares[:-1]) / 2).sum(0)


def detour(line: Trajectory) -> Tensor:
    """Length of the trajectory divided by the distance of its ends, (batch,): 1 where it is straight, at any speed.

    The length is that of the straight pieces between the states; its error falls with the square of the steps.
    """
    pieces = line.states.diff(dim=0).flatten(2).norm(dim=2).sum(0)
    return pieces / (line.states[-1] - line.states[0]).flatten(1).norm(dim=1)


def acceleration(velocity: Velocity, x: Tensor, t: Tensor) -> Tensor:
    """Acceleration of the trajectory through x (batch, ...) at t () or (batch,): dv/dt + (dv/dx) v, shaped like x."""
    return _velocity_and_acceleration(velocity, x, t)[1]


def curvature(velocity: Velocity, x: Tensor, t: Tensor) -> Tensor:
    """Curvature, 1 / radius, of the trajectory through x at t () or (batch,), (batch,), in 1 / units of x.

    |a - (a.v) v / |v|^2| / |v|^2, a the acceleration: do Carmo, "Differential Geometry of Curves and Surfaces", section
    1.5. Not finite where the velocity is 0. Two evaluations, one of them with a forward derivative.
    """
    slope, change = (part.flatten(1) for part in _velocity_and_acceleration(velocity, x, t))
    square = slope.square().sum(1)
    normal = change - ((change * slope).sum(1) / square)[:, None] * slope
    return normal.norm(dim=1) / square


def lipschitz(velocity: Velocity, x: Tensor, t: Tensor, key: Key, *, probes: int = 4, iterations: int = 8) -> Tensor:
    """The local Lipschitz constant |dv/dx| (largest singular value) of each sample, (batch,), in 1 / time.

    Bounds how fast nearby trajectories part and how long a stable explicit step may be. An estimate from below, whose
    error falls as (sigma_(probes + 1) / sigma_1)^(4 iterations + 2).
    """
    return singular_values(velocity, x, t, key, count=1, oversample=probes - 1, iterations=iterations).values[:, 0]


def lipschitz_between(velocity: Velocity, x: Tensor, other: Tensor, t: Tensor) -> Tensor:
    """|v(x, t) - v(other, t)| / |x - other| of each pair of samples, (batch,): no Lipschitz constant is below it."""
    change = (evaluate(velocity, x, t) - evaluate(velocity, other, t)).flatten(1).norm(dim=1)
    return change / (x - other).flatten(1).norm(dim=1)


def singular_values(
    velocity: Velocity,
    x: Tensor,
    t: Tensor,
    key: Key,
    *,
    count: int = 4,
    oversample: int = 4,
    iterations: int = 4,
    chunk_size: int | None = None,
) -> Singular:
    """The `count` largest singular values of the Jacobian dv/dx of each sample, by jvp and vjp alone.

    `spectral.singular` with count + oversample probes (no more than x has elements): 2 iterations + 2 evaluations of
    that many forward or backward derivatives, `chunk_size` of them at a time (all by default; the memory grows with
    it). x (batch, ...); t () or (batch,); key (2,). A sample's probes come from `fold_in(key, index)`.
    """
    size, x = x[0].numel(), x.contiguous()
    probes = min(count + oversample, size)
    if not 1 <= count <= size:
        raise ValueError(f"count {count} must be between 1 and the {size} elements of a sample")

    def field(x: Tensor) -> Tensor:
        return velocity(x, t).to(x.dtype)

    _, pullback = transform.vjp(field, x)

    def forward(columns: Tensor) -> Tensor:
        return _map_columns(lambda tangent: jvp(field, (x,), (tangent,))[1], columns, x, chunk_size)

    def transpose(columns: Tensor) -> Tensor:
        return _map_columns(lambda cotangent: pullback(cotangent)[0], columns, x, chunk_size)

    keys = prng.sample_keys(key, len(x))
    start = prng.normal(keys, (size, probes), x.dtype).to(x.device)
    triplets = spectral.singular(forward, transpose, start, iterations=iterations)
    left, right = (side[:, :count].transpose(0, 1).reshape(count, *x.shape) for side in (triplets.left, triplets.right))
    return Singular(triplets.values[:, :count], left, right)


def _velocity_and_acceleration(velocity: Velocity, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity and acceleration."""
    # Forward mode cannot differentiate an expanded tensor, whose elements share memory.
    x, t = x.contiguous(), torch.as_tensor(t, dtype=x.dtype, device=x.device).contiguous()
    slope = evaluate(velocity, x, t)
    return slope, jvp(lambda x, t: evaluate(velocity, x, t), (x, t), (slope, torch.ones_like(t)))[1]


def _map_columns(derivative, columns: Tensor, x: Tensor, chunk_size: int | None) -> Tensor:
    """A derivative of directions shaped like x, for columns (batch, n, k) at once."""
    directions = columns.permute(2, 0, 1).reshape(-1, *x.shape)
    products = vmap(derivative, chunk_size=chunk_size)(directions)
    return products.flatten(2).permute(1, 2, 0)
