"""Score-regularised consistency models (rCM): a consistency model, and distribution matching of its own images.

Zheng et al. 2025, arXiv:2510.08431; code NVlabs/rcm. The consistency part (`scm`) covers the teacher's modes, but blurs
details where the teacher's velocity has no weight; distribution matching (Yin et al. 2024, arXiv:2405.14867, DMD2)
moves the student's images along the difference of two scores: the teacher's, and that of a fake score, a copy of the
teacher which learns the student's own images by flow matching, several updates for each of the student's.

Both objectives take params {"transformer": the student's, "fake": the transformer of the fake score}; `rcm_loss` has a
gradient in the first alone, `fake_score_loss` in the second alone.
"""

import math
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key, Params, Tree, Velocity
from functional_sd3.flow import ode, path, schedule, trigflow
from functional_sd3.training.objectives import points, scm
from functional_sd3.training.objectives.segments import Teacher
from functional_sd3.training.objectives.types import Loss, Metrics, check_keys
from functional_sd3.transformer.mmdit import AttendBlocks

FAKE = "fake"
"""The name of the fake score's transformer among the parameters."""
METRICS = (*scm.METRICS, "matching")


def shifted_uniform(key: Key, shape: tuple[int, ...]) -> Tensor:
    """t ~ U[0, 1), shifted by 5 towards noise: where rCM compares the two scores."""
    return schedule.shift(path.uniform(key, shape), 5.0)


def rcm_loss(
    config: Any,
    teacher: Teacher,
    times: Tensor,
    *,
    matching: float = 1.0,
    density: scm.Density = scm.NOISY,
    noise_density: scm.Density = shifted_uniform,
    offset: float = 0.1,
    time_difference: float | None = 0.01,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "sdpa",
    attend: AttendBlocks | None = None,
) -> Loss:
    """mean (F - sg(F + g))^2 + matching mean (x - sg(x - d))^2: the student's objective.

    g: as in `scm_loss`, from g' = -cos a sqrt(1 - rho^2 sin^2 a) (F - F_teacher) - rho (cos a sin a y + cos a sin a
    dF/da). x: the student's prediction of the data after 0 to n - 1 of its own steps on `times` (n + 1,), as many as
    the sample's key determines, by `ode.renoised`; the prediction alone has a gradient. d = (x_fake - x_teacher) / mean
    |x - x_teacher|, of the predictions at x noised to a t of `noise_density`. Both parts are means over a sample's
    numbers, so that their balance does not depend on its size (the paper's code has sums, weighted 100 to 1, and g of
    norm 1). The rest as in `scm_loss`. Metrics: those of `scm_loss`; matching, mean |x_fake - x_teacher|.
    """
    scm.check_offset(offset)
    check_times(times)
    if not 0 <= matching < math.inf:
        raise ValueError(
            f"matching {matching} must be a finite number of at least 0, the weight of distribution matching"
        )
    options: dict[str, Any] = {"implementation": implementation, "attend": attend}
    velocity_of = points.model_velocity(config, dtype=dtype, **options)
    tangent_velocity_of = points.model_velocity(config, time_difference=time_difference, **options)

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        _check(params, batch, "rcm_loss")
        check_keys(keys, batch["latents"])
        arc_key, own_key, level_key = prng.split(keys, 3).unbind(-2)
        y, a = scm.noised_arc(arc_key, batch["latents"], density)
        rho = batch.get("tangent", torch.ones_like(a))
        guided, student = teacher(batch), velocity_of(params, batch)
        direction = scm.tangent(tangent_velocity_of(params, batch), guided, y, a, rho, share)
        losses, metrics = scm.regression(trigflow.from_flow(student)(y, a), direction, offset)
        x = own_images(student, own_key, batch["latents"], times)
        fake = velocity_of({"transformer": params[FAKE]}, batch)
        step, difference = matching_direction(fake, guided, x, level_key, noise_density)
        total = losses + matching * points.sample_means((x - (x.detach() - step)).square())
        return total.mean(), {**metrics, "matching": difference}

    return loss


def fake_score_loss(
    config: Any,
    times: Tensor,
    *,
    noise_density: scm.Density = shifted_uniform,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "sdpa",
    attend: AttendBlocks | None = None,
) -> Loss:
    """Rectified-flow loss of the fake score on the student's own images, of which it learns the score.

    times, noise_density, dtype, implementation, attend, params and batch: as in `rcm_loss`. No metrics.
    """
    check_times(times)
    velocity_of = points.model_velocity(config, dtype=dtype, implementation=implementation, attend=attend)

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        _check(params, batch, "fake_score_loss")
        check_keys(keys, batch["latents"])
        own_key, level_key = prng.split(keys).unbind(-2)
        with torch.no_grad():
            x = own_images(velocity_of(params, batch), own_key, batch["latents"], times)
        t, noise = _level(level_key, x, noise_density)
        return path.loss(velocity_of({"transformer": params[FAKE]}, batch), x, noise, t).mean(), {}

    return loss


def share(a: Tensor, rho: Tensor) -> Tensor:
    """cos a sqrt(1 - rho^2 sin^2 a): rCM's share of the teacher's velocity, from cos a at the start of the warmup to
    cos^2 a at its end."""
    return torch.cos(a) * torch.sqrt(1 - (rho * torch.sin(a)).square())


def own_images(velocity: Velocity, keys: Key, like: Tensor, times: Tensor) -> Tensor:
    """The student's predictions of the data at a random one of `times[:-1]` each, reached from noise by its own steps.

    Only the predictions have a gradient. keys (batch, 2); like (batch, ...): a tensor of their shape.
    """
    count = len(times) - 1
    step_key, start_key, noise_key = prng.split(keys, 3).unbind(-2)
    wide = torch.promote_types(like.dtype, torch.float32)
    grid = times.to(like.device, wide)
    last = prng.randint(step_key, (), 0, count)
    x = prng.normal(start_key, tuple(like.shape[1:])).to(like.device, wide)
    if count > 1:
        steps = torch.arange(count, dtype=torch.int64, device=last.device)[:, None]
        with torch.no_grad():
            # A sample that has reached its last time stays there: steps of no length.
            x = ode.integrate(ode.renoised(noise_key), velocity, x, grid[torch.minimum(steps, last)])
    return path.denoised(x, velocity(x, grid[last]), grid[last])


def matching_direction(
    fake: Velocity, teacher: Velocity, x: Tensor, keys: Key, density: scm.Density
) -> tuple[Tensor, Tensor]:
    """d = (x_fake - x_teacher) / mean |x - x_teacher| at x noised to a random t, and mean |x_fake - x_teacher|, ().

    Against d the student's images grow likelier under the teacher and less likely under the fake score. Without
    gradients; 0 for a sample where it is not finite, which the mean leaves out.
    """
    with torch.no_grad():
        x = x.detach()
        t, noise = _level(keys, x, density)
        noised = path.interpolate(x, noise, t)
        theirs = path.denoised(noised, teacher(noised, t).to(x.dtype), t)
        difference = path.denoised(noised, fake(noised, t).to(x.dtype), t) - theirs
        size = points.sample_means((x - theirs).abs()).clamp_min(1e-5)
        step, is_finite = scm.finite_samples(difference / path.broadcast(size, x))
        sizes = torch.where(is_finite, points.sample_means(difference.abs()), 0.0)
        return step, sizes.sum() / is_finite.to(sizes.dtype).sum().clamp_min(1.0)


def check_times(times: Tensor) -> None:
    """Raises ValueError for a student's grid without a step."""
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(
            f"times {list(times.shape)} must be the student's grid, (steps + 1,), such as schedule.even(4)"
        )


def _level(keys: Key, x: Tensor, density: scm.Density) -> tuple[Tensor, Tensor]:
    """A random t (batch,) and noise shaped like x."""
    time_key, noise_key = prng.split(keys).unbind(-2)
    return density(time_key, ()).to(x), prng.normal(noise_key, tuple(x.shape[1:])).to(x)


def _check(params: Params, batch: Tree, what: str) -> None:
    points.check_batch(batch, ("latents", "context", "pooled"), what)
    if FAKE not in params:
        raise ValueError(
            f'{what} needs params["{FAKE}"], the transformer of the fake score, which starts as the teacher'
        )
