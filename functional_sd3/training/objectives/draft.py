"""DRaFT-K: a differentiable reward of the image, differentiated through the last K steps of the sampler.

Clark et al. 2023, arXiv:2309.17400, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards".
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import dispatch
from functional_sd3.core.types import Key, Params, Tree, Velocity
from functional_sd3.flow import ode
from functional_sd3.flow.analysis import adjoint
from functional_sd3.flow.ode.method import Method
from functional_sd3.training.objectives import points
from functional_sd3.training.objectives.points import VelocityOf
from functional_sd3.training.objectives.types import Loss, Metrics, check_keys
from functional_sd3.training.rewards.types import RewardError

METRICS = ("kl", "reward")
TotalReward = Callable[[Tensor, Tree], Tensor]
"""`(images in [0, 1], rows of the batch) -> (batch,)`, with a gradient with respect to the images."""


def draft_loss(
    velocity_of: VelocityOf,
    decode: Callable[[Params, Tensor], Tensor],
    reward: TotalReward,
    times: Tensor,
    *,
    start: Params | None = None,
    last: int = 1,
    kl: float = 0.0,
    method: Method = ode.EULER,
) -> Loss:
    """-mean reward(decode(x_0)) + kl mean (v - v_start)^2, with the derivative through the `last` steps alone.

    batch: noise (batch, channels, height, width), the start of the run; context, pooled; and what `reward` reads.
    velocity_of: `points.model_velocity(config)`, or that guided; it takes `attend`. decode: (params, latents) -> images
    in [0, 1]. times (steps + 1,): the grid. The steps are recomputed in the backward pass (`adjoint.checkpointed`), so
    that as many cost no more memory than one. last: 1 is best in the paper; through all of them gradients explode.
    start: the parameters at the start, whose velocity is compared at the first state with a gradient. Raises ValueError
    for more steps than there are, RewardError for a reward without a gradient. Metrics: reward; kl, mean
    (v - v_start)^2, 0 without a start.
    """
    steps = len(times) - 1
    if not 1 <= last <= steps:
        raise ValueError(f"last {last} must be from 1 to {steps}, the number of steps")
    checkpointed, split = adjoint.checkpointed(method), steps - last

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        points.check_batch(batch, ("noise",), "draft_loss")
        check_keys(keys, batch["noise"])
        velocity = velocity_of(params, batch)
        with torch.no_grad():
            state = ode.start(checkpointed, batch["noise"], times[0])
            state = ode.run(checkpointed, velocity, state, times[: split + 1], ends=False) if split else state
        latents = ode.run(checkpointed, velocity, state, times[split:]).x
        rewards = reward(decode(params, latents), batch)
        if dispatch.tracking(latents) != "none" and dispatch.tracking(rewards) == "none":
            raise RewardError("the reward has no gradient with respect to the images, which draft learns from")
        drift = torch.zeros_like(rewards) if start is None else _drift(velocity, velocity_of(start, batch), state)
        return (kl * drift - rewards).mean(), {"kl": drift.mean(), "reward": rewards.mean()}

    return loss


def _drift(velocity: Velocity, reference: Velocity, state: Any) -> Tensor:
    with torch.no_grad():
        before = reference(state.x, state.t)
    return points.sample_means((velocity(state.x, state.t) - before).square())
