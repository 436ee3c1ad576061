"""Log-likelihood of data under a flow, by the instantaneous change of variables.

Chen et al. 2018, arXiv:1806.07366, theorem 1, and Grathwohl et al. 2018 (FFJORD), arXiv:1810.01367: along
dx/dt = v(x, t), d log p_t(x_t)/dt = -div v(x_t, t). With the prior N(0, 1) at t = 1

    log p_0(x_0) = log N(x_1; 0, 1) + integral_0^1 div v(x_t, t) dt,

where x_t and the integral are one augmented state that any method of `ode` carries from data to noise.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key, Velocity
from functional_sd3.flow import ode
from functional_sd3.flow.analysis.divergence import (
    CHUNK,
    Draw,
    Estimator,
    Mode,
    QuadraticForms,
    divergence,
    exact,
    probe_vectors,
    quadratic_forms,
    rademacher,
)
from functional_sd3.flow.analysis.inversion import (
    Inversion,
    RoundTrip,
    ascending,
    corrected,
    coupled,
    invert,
    plain,
    round_trip,
)
from functional_sd3.flow.analysis.matching import advantage, losses, standard_error
from functional_sd3.flow.times import is_readable


class Estimate(NamedTuple):
    """A log-likelihood in nats and its terms; all (batch,) but the noise and the volumes."""

    log_likelihood: Tensor
    """log_prior + the mean of the volumes."""
    standard_error: Tensor
    """Deviation of the volumes / sqrt(probes) of Hutchinson's estimate, NaN for one probe; 0 for the exact one."""
    noise: Tensor
    """(batch, ...): the end of the flow from the data, at t = 1."""
    log_prior: Tensor
    """log N(noise; 0, 1)."""
    volumes: Tensor
    """(probes, batch), (1, batch) for the exact one: the integral of the divergence as each probe estimates it. Those
    of several conditions that share their key may be subtracted from one another probe by probe."""


def log_likelihood(
    velocity: Velocity,
    x0: Tensor,
    *,
    method: Any,
    times: ode.Times,
    divergence: Estimator = "exact",
    key: Key | None = None,
    probes: int = 1,
    **options: Any,
) -> Tensor:
    """Log-likelihood log p_0(x0) in nats, (batch,), with the prior N(0, 1) at t = 1; arguments as in `estimate`."""
    return estimate(
        velocity, x0, method=method, times=times, divergence=divergence, key=key, probes=probes, **options
    ).log_likelihood


def estimate(
    velocity: Velocity,
    x0: Tensor,
    *,
    method: Any,
    times: ode.Times,
    divergence: Estimator = "exact",
    key: Key | None = None,
    probes: int = 1,
    draw: Draw | None = None,
    resample: bool = False,
    mode: Mode | None = None,
    chunk_size: int | None = CHUNK,
    **options: Any,
) -> Estimate:
    """The log-likelihood of x0 (batch, ...) and its standard error, in float32 (float64 for a float64 x0).

    velocity: as for `ode.integrate`, of independent samples. method: of `ode`; times: (n + 1,) or
    (n + 1, batch) from the data's time to 1, or the same descending, as `schedule.sigmas` gives them. The data are
    x0 at the lesser end: 0, or the time of another density.
    divergence: "exact", D evaluations of the Jacobian a step for D numbers a sample, or "hutchinson", one a probe; key,
    probes, draw, mode, chunk_size: as in `divergence`.
    resample: new probes at every evaluation, from fold_in(key, the bits of t), instead of the same along the run. Their
    error averages out over the steps and is the smaller; with the same ones the run is an ODE (FFJORD, section 3.1),
    which adaptive methods need and whose error for two conditions is nearly the same.
    options: of `ode.integrate`: on_step, check, and rtol, atol for adaptive methods, which hold the error of x and of
    the volumes together: their state is (batch, D + probes).

    Works under vmap, grad (in x0, times and what the velocity closes over) and compile where the velocity does and the
    method has fixed steps. Raises ValueError when times do not end at 1, the prior's place, and as `divergence` does.
    """
    if divergence not in ("exact", "hutchinson"):
        raise ValueError(f"divergence {divergence!r} must be exact or hutchinson")
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
    grid = _grid_to_prior(times, x0)
    hutchinson = divergence == "hutchinson"
    rows = probes if hutchinson else 1
    keys = prng.sample_keys(key, len(x0)) if hutchinson else None
    vectors = None if keys is None else probe_vectors(keys, probes, x0, draw)

    def forms(x: Tensor, t: Tensor) -> QuadraticForms:
        if keys is None or vectors is None:
            return exact(velocity, x, t, mode=mode, chunk_size=chunk_size)
        probe = probe_vectors(prng.fold_in(keys, _bits(t)), probes, x, draw) if resample else vectors
        return quadratic_forms(velocity, x, t, probe, mode=mode, chunk_size=chunk_size)

    def augmented(state: Tensor, t: Tensor) -> Tensor:
        value, traces = forms(state[:, :-rows].reshape(x0.shape), t)
        return torch.cat([value.reshape(len(x0), -1), traces.T], dim=1)

    start = torch.cat([x0.reshape(len(x0), -1), x0.new_zeros(len(x0), rows)], dim=1)
    end = ode.integrate(method, augmented, start, grid, **options)
    noise, volumes = end[:, :-rows].reshape(x0.shape), end[:, -rows:].T
    log_prior = log_normal(noise)
    error = standard_error(volumes) if hutchinson else torch.zeros_like(log_prior)
    return Estimate(log_prior + volumes.mean(0), error, noise, log_prior, volumes)


def log_normal(x: Tensor) -> Tensor:
    """log N(x; 0, 1) of each sample, (batch,): -(|x|^2 + D log 2 pi) / 2."""
    flat = x.reshape(len(x), -1)
    return -0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))


def bits_per_dimension(log_likelihood: Tensor, dimensions: int, *, bin_width: float = 1.0) -> Tensor:
    """-log_likelihood / (D log 2) - log2(bin_width), lower is likelier; of nats, any shape.

    bin_width 1 is the density's own. For data that were rounded to bins and dequantised it is their width in the units
    of x0 (2 / 255 for bytes scaled to [-1, 1]), and the result a bound on the bits a lossless code needs.
    """
    return -log_likelihood / (dimensions * math.log(2)) - math.log2(bin_width)


def _grid_to_prior(times: ode.Times, x: Tensor) -> Tensor:
    grid = ascending(times, x)
    if is_readable(grid) and not (grid[-1] == 1).all():
        raise ValueError(f"times end at {grid[-1].min():.6g}; the prior, which a likelihood needs, is at t = 1")
    return grid


def _bits(t: Tensor) -> Tensor:
    """The bits of float32 t as int32: a different integer for every time."""
    return t.detach().to(torch.float32).view(torch.int32)


__all__ = [
    "Estimate",
    "Inversion",
    "RoundTrip",
    "advantage",
    "bits_per_dimension",
    "corrected",
    "coupled",
    "divergence",
    "estimate",
    "invert",
    "log_likelihood",
    "log_normal",
    "losses",
    "plain",
    "rademacher",
    "round_trip",
    "standard_error",
]
