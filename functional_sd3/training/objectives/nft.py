"""DiffusionNFT: a velocity trained towards its own good samples and away from its bad ones (arXiv:2509.16117).

Zheng et al. 2025, "DiffusionNFT: Online Diffusion Reinforcement with Forward Process", equations 4 to 7; weights and
normalisation as in the authors' code. No likelihood, any sampler, no guidance.
"""

from typing import Any

import torch
from torch import Tensor

from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.flow import path
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training.objectives import points, policy
from functional_sd3.training.objectives.types import Loss, Metrics, check_keys
from functional_sd3.training.rewards.advantages import CLIP
from functional_sd3.transformer.mmdit import AttendBlocks

METRICS = ("kl", "old_distance")


def nft_loss(
    config: Any,
    *,
    beta: float = 1.0,
    kl: float = 1e-4,
    clip: float = CLIP,
    negative: Conditioning | None = None,
    cfg: float = 1.0,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "sdpa",
    attend: AttendBlocks | None = None,
) -> Loss:
    """clip (r l(v+) + (1 - r) l(v-)) / beta + kl mean (v - v_ref)^2 at the points of a batch (`points`).

    r = clamp(advantage / clip, -1, 1) / 2 + 1/2; v+ = beta v + (1 - beta) v_old and v- = (1 + beta) v_old - beta v;
    l(v') = mean (x_0' - x_0)^2 / sg(mean |x_0' - x_0|), x_0' = x_t - t v'. Advantage 0 gives no gradient to first
    order: samples of groups without spread can be left out. beta: 1 for exact rewards, 0.1 where several are summed.
    negative, cfg: guidance of the policy, whose two velocities are both differentiated; the velocities of the batch are
    then guided too. dtype, implementation, attend: as in `flow_loss`. Draws nothing from the keys: the points are drawn
    with the batch.
    Metrics: kl, mean (v - v_ref)^2, the integrand of the divergence of the two flows; old_distance, mean (v - v_old)^2.
    """
    if not 0 < beta:
        raise ValueError(f"beta {beta} must be positive")
    velocity_of = points.model_velocity(config, dtype=dtype, implementation=implementation, attend=attend)
    if negative is not None:
        velocity_of = policy.guided_velocity(velocity_of, negative, cfg)

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        points.check_batch(batch, ("latents", "noise", "t", "advantage", "old", "reference"), "nft_loss")
        check_keys(keys, batch["latents"])
        x, x0, t, old = points.noised(batch), batch["latents"], batch["t"], batch["old"]
        v = velocity_of(params, batch)(x, t)
        good = (batch["advantage"] / clip).clamp(-1.0, 1.0) / 2 + 0.5
        positive = _error(x, x0, t, beta * v + (1 - beta) * old)
        negative = _error(x, x0, t, (1 + beta) * old - beta * v)
        drift = points.sample_means((v - batch["reference"]).square())
        losses = clip / beta * (good * positive + (1 - good) * negative) + kl * drift
        moved = points.sample_means((v - old).square())
        return losses.mean(), {"kl": drift.mean(), "old_distance": moved.mean()}

    return loss


def _error(x: Tensor, x0: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """Squared error of the predicted data over its mean absolute error, (batch,)."""
    difference = path.denoised(x, v, t) - x0
    size = points.sample_means(difference.abs()).clamp_min(1e-5).detach()
    return points.sample_means(difference.square()) / size
