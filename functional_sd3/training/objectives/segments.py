"""Segment distillation: one step of a student for several of a teacher, with the teacher's guidance folded in.

Salimans and Ho 2022, arXiv:2202.00512 (progressive distillation); Yan et al. 2024, arXiv:2405.07510 (PeRFlow: segments
of a rectified flow); Meng et al. 2023, arXiv:2210.03142 (guidance folded in).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key, Params, Tree, Velocity
from functional_sd3.flow import ode, path
from functional_sd3.flow.ode.method import Method
from functional_sd3.training.objectives import points
from functional_sd3.training.objectives.types import Loss, Metrics, check_keys
from functional_sd3.transformer.mmdit import AttendBlocks

Teacher = Callable[[Tree], Velocity]
"""rows with "context" and "pooled" -> the velocity that a student learns from, guidance included."""
METRICS = ("error",)


def segments_loss(
    config: Any,
    teacher: Teacher,
    times: Tensor,
    *,
    inner: int = 3,
    offset: float = 1e-3,
    method: Method = ode.EULER,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "sdpa",
    attend: AttendBlocks | None = None,
) -> Loss:
    """mean l / sg(l + offset), l = mean (v(x, t_i) - (z - x) / (t_{i+1} - t_i))^2 at a random segment i of each sample.

    x = (1 - t_i) x_0 + t_i noise is on the path of the data; z is x after the teacher's `inner` steps to t_{i+1},
    without gradients. times (segments * inner + 1,): the teacher's grid, of which every `inner`-th time is the
    student's; a student of n segments, as the teacher with its own grid and inner = 2, gives one of n / 2. Euler's
    method draws the student on `times[::inner]`. batch: {"latents": normalised (batch, channels, height, width),
    "context", "pooled"}. dtype, implementation, attend: as in `flow_loss`, the student's. Raises ValueError for a grid
    that is not of whole segments. Metrics: error, mean l.
    """
    count, rest = divmod(len(times) - 1, inner)
    if inner < 1 or rest or count < 1:
        raise ValueError(f"a grid of {len(times) - 1} steps is not made of segments of inner = {inner} steps each")
    velocity_of = points.model_velocity(config, dtype=dtype, implementation=implementation, attend=attend)

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        points.check_batch(batch, ("latents", "context", "pooled"), "segments_loss")
        latents = points.wide_latents(batch)
        check_keys(keys, latents)
        segment_key, noise_key = prng.split(keys).unbind(-2)
        segment = prng.randint(segment_key, (), 0, count)
        steps = torch.arange(inner + 1, dtype=torch.int64, device=segment.device)
        grid = times.to(latents)[segment * inner + steps[:, None]]
        x = path.interpolate(latents, prng.normal(noise_key, tuple(latents.shape[1:])).to(latents), grid[0])
        with torch.no_grad():
            end = ode.integrate(method, teacher(batch), x, grid)
            target = (end - x) / path.broadcast(grid[-1] - grid[0], x)
        error = points.sample_means((velocity_of(params, batch)(x, grid[0]) - target).square())
        return normalised(error, offset).mean(), {"error": error.mean()}

    return loss


def normalised(error: Tensor, offset: float, power: float = 1.0) -> Tensor:
    """error / sg(error + offset)^power of each sample: every sample's gradient weighs alike (Geng et al. 2025,
    arXiv:2505.13447, section 4.3)."""
    return error / (error.detach() + offset) ** power
