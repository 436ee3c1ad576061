"""Consistency models of continuous time (sCM), learned from a teacher's flow.

Lu and Song 2024, arXiv:2410.11081, equations 6 to 8 and algorithm 1, for networks of a rectified flow by the exact
transform of Chen et al. 2025, arXiv:2503.09641 (SANA-Sprint), `flow.trigflow`. A consistency function f maps every
point of a path to the path's end, so that df/da = 0 along it; with f = cos a y - sin a F that is a target of F. The
student's velocity is then that of the line to the end: it is drawn by `ode.renoised`, in any number of steps.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core import spec as specs
from functional_sd3.core.attention import Implementation
from functional_sd3.core.spec import Param
from functional_sd3.core.types import Key, Params, Tree, Velocity
from functional_sd3.flow import path, trigflow
from functional_sd3.flow.path import broadcast
from functional_sd3.training.objectives import points
from functional_sd3.training.objectives.segments import Teacher
from functional_sd3.training.objectives.types import Loss, Metrics, check_keys
from functional_sd3.transformer.mmdit import AttendBlocks

METRICS = ("error", "tangent", "teacher_distance", "dropped")
LOG_VARIANCE = "log_variance"
"""The learned weight's name among the parameters of a student."""
Density = Callable[[Key, tuple[int, ...]], Tensor]
Weight = Callable[[Tensor], Tensor]


NOISY: Density = partial(path.logit_normal, mean=0.7, std=1.6)
"""t / (1 - t) = tan a = e^N(0.7, 1.6), the draws of rCM."""


class Tangent(NamedTuple):
    """cos a df/da along the teacher's flow, and the teacher's F at the same point."""

    tangent: Tensor
    teacher: Tensor


def scm_loss(
    config: Any,
    teacher: Teacher,
    *,
    density: Density = NOISY,
    weight: Weight | None = None,
    offset: float = 0.1,
    time_difference: float | None = 0.01,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "sdpa",
    attend: AttendBlocks | None = None,
) -> Loss:
    """w(a) e^(-l(a)) mean (F - sg(F + g))^2 + l(a), g the normalised tangent of the consistency function.

    g' = -cos^2 a (F - F_teacher) - rho (cos a sin a y + cos a sin a dF/da), the derivative along the teacher's flow by
    one jvp apart from the step: it keeps no graph, and is computed in the parameters' dtype. g = g' / (rms g' +
    offset). At the consistency function of the teacher's flow g is 0. A sample whose tangent is not finite has g = 0.

    batch: latents (batch, channels, height, width), context, pooled; "tangent" (batch,): rho in [0, 1], by default 1:
    the warmup min(1, step / H) of the part that needs the derivative. l: of `log_variance_spec` where params have such
    an entry, else 0. density: of t, by default the draws of rCM. weight: w, by default 1 / tan a with a learned l (sCM)
    and 1 without (rCM). time_difference: smooths the derivative of the embedding of t (`mmdit.apply`);
    None for its own, whose ripples no sampler follows. dtype, implementation, attend: as in `flow_loss`.

    Metrics: error, mean (F - F - g)^2, at most 1; tangent, mean rms g' over all samples that have one;
    teacher_distance, mean (F - F_teacher)^2; dropped, the share of samples whose tangent is not finite.
    """
    check_offset(offset)
    velocity_of = points.model_velocity(config, dtype=dtype, implementation=implementation, attend=attend)
    tangent_velocity_of = points.model_velocity(
        config, implementation=implementation, time_difference=time_difference, attend=attend
    )

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        points.check_batch(batch, ("latents", "context", "pooled"), "scm_loss")
        check_keys(keys, batch["latents"])
        y, a = noised_arc(keys, batch["latents"], density)
        rho = batch.get("tangent", torch.ones_like(a))
        direction = tangent(tangent_velocity_of(params, batch), teacher(batch), y, a, rho, scm_share)
        F = trigflow.from_flow(velocity_of(params, batch))(y, a)
        losses, metrics = regression(F, direction, offset)
        log_variance = params.get(LOG_VARIANCE)
        if log_variance is not None:
            level = log_variance_of(log_variance, a)
            return (torch.exp(-level) * (weight or cotangent)(a) * losses + level).mean(), metrics
        return (losses if weight is None else weight(a) * losses).mean(), metrics

    return loss


def noised_arc(keys: Key, latents: Tensor, density: Density) -> tuple[Tensor, Tensor]:
    """y = cos a x_0 + sin a noise of each sample, and its angle a (batch,), drawn by a density of t."""
    time_key, noise_key = prng.split(keys).unbind(-2)
    wide = torch.promote_types(latents.dtype, torch.float32)
    a = trigflow.angle(density(time_key, ()).to(latents.device, wide))
    noise = prng.normal(noise_key, tuple(latents.shape[1:])).to(latents.device, wide)
    return broadcast(torch.cos(a), latents) * latents.to(wide) + broadcast(torch.sin(a), latents) * noise, a


def tangent(
    velocity: Velocity, teacher: Velocity, y: Tensor, a: Tensor, rho: Tensor, share: Callable[[Tensor, Tensor], Tensor]
) -> Tangent:
    """-share(a, rho) (F - F_teacher) - rho (cos a sin a y + cos a sin a dF/da) at y (batch, ...), without a graph.

    velocity, teacher: of the rectified flow; F is the student's. dF/da is along the teacher's flow, and its factor
    inside of the jvp, where it keeps the numbers small ("JVP rearrangement"). rho (batch,); share: `scm_share` or
    `rcm_share`; with rho = 1 both give cos a df/da.
    """
    with torch.no_grad():
        target = trigflow.from_flow(teacher)(y, a).to(y.dtype)
        both = torch.cos(a) * torch.sin(a)
        directions = (broadcast(both, y) * target, both)
        F, derivative = torch.func.jvp(trigflow.from_flow(velocity), (y, a), directions)[:2]
        curved = broadcast(rho, y) * (broadcast(both, y) * y + derivative)
        return Tangent(-broadcast(share(a, rho), y) * (F - target) - curved, target)


def scm_share(a: Tensor, rho: Tensor) -> Tensor:
    """cos^2 a: sCM's share of the teacher's velocity, whatever the warmup."""
    return torch.cos(a).square()


def regression(F: Tensor, direction: Tangent, offset: float) -> tuple[Tensor, Metrics]:
    """mean (F - sg(F + g))^2 of each sample, (batch,), and the metrics; g = tangent / (its rms + offset)."""
    with torch.no_grad():
        raw, is_finite = finite_samples(direction.tangent)
        size = points.sample_means(raw.square()).sqrt()
        target = F + raw / broadcast(size + offset, F)
        distance = points.sample_means(torch.where(broadcast(is_finite, F), F - direction.teacher, 0.0).square())
        share = is_finite.to(size.dtype)
        metrics = {
            "tangent": size.sum() / share.sum().clamp_min(1.0),
            "teacher_distance": distance.sum() / share.sum().clamp_min(1.0),
            "dropped": 1 - share.mean(),
        }
    losses = points.sample_means((F - target).square())
    return losses, {"error": losses.mean(), **metrics}


def finite_samples(values: Tensor) -> tuple[Tensor, Tensor]:
    """values (batch, ...) with zeros for samples that hold a number that is not finite, and which do not, (batch,)."""
    is_finite = torch.isfinite(values).flatten(1).all(1)
    return torch.where(broadcast(is_finite, values), values, 0.0), is_finite


def log_variance_spec(size: int = 8) -> Tree:
    """Parameters of l(a) = sum_k w_k cos(2 k a), k from 0, which starts at 0 everywhere."""
    return {"weight": Param((size,), specs.zeros, ("frequencies",))}


def log_variance_of(params: Params, a: Tensor) -> Tensor:
    """l(a) of the angles (batch,), where it is learned the logarithm of the mean weighted loss at a.

    Karras et al. 2023, arXiv:2312.02696 (EDM2), equation 21.
    """
    weight = params["weight"].to(a.dtype)
    orders = 2 * torch.arange(len(weight), dtype=a.dtype, device=a.device)
    return (torch.cos(a[..., None] * orders) * weight).sum(-1)


def cotangent(a: Tensor) -> Tensor:
    """1 / tan a, sCM's weight."""
    return torch.cos(a) / torch.sin(a)


def check_offset(offset: float) -> None:
    """Raises ValueError for an offset that does not keep the normalised tangent finite."""
    if not 0 < offset < math.inf:
        raise ValueError(f"offset {offset} must be a positive number: it is added to the tangent's rms, which may be 0")
