"""Shortcut models: a step of length d learns two of the network's own steps of d / 2.

Frans et al. 2024, arXiv:2410.12557, section 3, with the mean velocity u(x, t, r) as s(x, t, d), d = t - r.
"""

from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import prng, tree
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.flow import path, schedule
from functional_sd3.training.objectives import points
from functional_sd3.training.objectives.meanflow import (
    Density,
    as_network,
    split_batch,
    unequal_rows,
)
from functional_sd3.training.objectives.segments import Teacher
from functional_sd3.training.objectives.types import Loss, Metrics, check_keys
from functional_sd3.transformer import mmdit

METRICS = ("error", "bootstrap")
AVERAGE = "average"
"""The name of the averaged parameters among the parameters."""


def shortcut_loss(
    network: Any,
    *,
    teacher: Teacher | None = None,
    equal: float = 0.875,
    finest: int = 128,
    density: Density = path.uniform,
    shift: float = 1.0,
    clip: float | None = 4.0,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "sdpa",
    attend: mmdit.AttendBlocks | None = None,
) -> Loss:
    """mean |u(x_t, t, r) - target|^2; no derivative, but errors add up over the halvings.

    For the share `equal` of the samples (those of `meanflow_loss`) r = t, t is drawn from `density` moved by
    `shift`, and the target is the velocity: the teacher's, or noise - x_0. For the others the target is the mean of
    two of the network's own steps without gradients, by the averaged parameters params["average"] where they are
    given, each over half of the interval: u over [m, t] at x_t, and u over [r, m] where that leads, clipped to
    +-clip. Intervals are even before the shift: of length d = 2^-k, k uniform, in 1 / d places; halves of 1 /
    finest, a power of 2, are velocities of one time. The paper takes these steps by averaged parameters. Guidance,
    where it is, is in the velocity alone: here that is the teacher's.

    network, batch, keys, dtype, implementation, attend: as in `meanflow_loss`. Metrics: error, the mean, and bootstrap,
    that of the samples with r < t. Raises ValueError for a model without `interval_size`, and a `finest` that is no
    power of 2.
    """
    u_of = as_network(network, "shortcut_loss", dtype=dtype, implementation=implementation, attend=attend)
    if finest < 2 or finest & (finest - 1):
        raise ValueError(f"finest {finest} must be a power of 2, at least 2")
    if not 0 <= equal <= 1:
        raise ValueError(f"equal {equal} is a share of the samples, between 0 and 1")
    halvings = finest.bit_length() - 1

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        latents, text = split_batch(network, batch, "shortcut_loss")
        check_keys(keys, latents)
        time_key, power_key, place_key, noise_key = prng.split(keys, 4).unbind(-2)
        rows = unequal_rows(len(latents), equal, latents.device)
        d = 0.5 ** prng.randint(power_key, (), 0, halvings).to(latents)
        # From the top: the last of 1 / d intervals ends at the data.
        high = 1 - d * (prng.uniform(place_key, ()).to(latents) / d).floor()
        free = schedule.shift(density(time_key, ()), shift).to(latents)
        levels = (schedule.shift(level, shift) for level in (high, high - d / 2, high - d))
        t, middle, r = (free.index_copy(0, rows, level[rows]) for level in levels)
        noise = prng.normal(noise_key, tuple(latents.shape[1:])).to(latents)
        x = path.interpolate(latents, noise, t)
        steps_by = params.get(AVERAGE, params)
        frozen = tree.map(lambda leaf: leaf.detach(), steps_by)
        params = {name: part for name, part in params.items() if name != AVERAGE}
        with torch.no_grad():
            v = path.target(latents, noise) if teacher is None else teacher(text)(x, t).to(x.dtype)
            part = {name: leaf[rows] for name, leaf in text.items()}
            is_finest = d[rows] <= 2 / finest
            target = v
            if len(rows):
                two = _two_steps(u_of(frozen, part), x[rows], t[rows], middle[rows], r[rows], is_finest)
                target = v.index_copy(0, rows, two if clip is None else two.clamp(-clip, clip))
        error = points.sample_means((u_of(params, text)(x, t, r) - target).square())
        bootstrap = error[rows].mean() if len(rows) else error.new_zeros(())
        return error.mean(), {"error": error.mean(), "bootstrap": bootstrap}

    return loss


def _two_steps(u: Any, x: Tensor, t: Tensor, middle: Tensor, r: Tensor, is_finest: Tensor) -> Tensor:
    """Mean velocity over [r, t] of a step to `middle` and one to r; velocities of one time where `is_finest`."""
    first = u(x, t, torch.where(is_finest, t, middle))
    there = x + path.broadcast(middle - t, x) * first
    second = u(there, middle, torch.where(is_finest, middle, r))
    share = path.broadcast((t - middle) / (t - r), x)
    return share * first + (1 - share) * second
