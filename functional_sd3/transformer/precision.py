"""Errors of the velocity with quantised or low-precision parameters."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.types import Params
from functional_sd3.transformer import mmdit
from functional_sd3.transformer.mmdit import Config


class Step(NamedTuple):
    """A state of a run, its time, and its velocity by exact parameters."""

    x: Tensor
    t: Tensor
    velocity: Tensor


def trajectory(
    reference: Params, config: Config, noise: Tensor, sigmas: Tensor, context: Tensor, pooled: Tensor
) -> list[Step]:
    """The run of `reference` by Euler's method from `noise` (batch, channels, height, width) along `sigmas`
    (steps + 1,). context (batch, tokens, context_width), pooled (batch, pooled_width)."""
    x, steps = noise, []
    for t, t_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        steps.append(Step(x, t, mmdit.apply(reference, config, x, t, context, pooled)))
        x = x + (t_next - t) * steps[-1].velocity
    return steps


def trajectory_errors(
    steps: Sequence[Step], params: Params, config: Config, context: Tensor, pooled: Tensor
) -> tuple[Tensor, Tensor]:
    """|v - v_reference| / |v_reference| of `params`: at every step (steps,), norms over the batch, and of the whole run
    (), norms over all steps."""
    differences = [mmdit.apply(params, config, x, t, context, pooled) - exact for x, t, exact in steps]
    above, below = (torch.stack([each.norm() for each in many]) for many in (differences, [s.velocity for s in steps]))
    return above / below, above.norm() / below.norm()


def velocity_errors(
    reference: Params, params: Params, config: Config, noise: Tensor, sigmas: Tensor, context: Tensor, pooled: Tensor
) -> Tensor:
    """|v - v_reference| / |v_reference| at every step of a run, (steps,), the norms over the whole batch.

    reference: float32 parameters; the states are those of their run, as in `trajectory`. params: compared with them, of
    any dtype, quantised or with a LoRA.
    """
    steps = trajectory(reference, config, noise, sigmas, context, pooled)
    return trajectory_errors(steps, params, config, context, pooled)[0]
