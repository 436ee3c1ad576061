"""Advantage-weighted matching: the flow loss of a policy's own samples, times their advantages (arXiv:2509.25050).

Xue et al. 2025, "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models"; robust loss, clipping
and weights as in the authors' code.
"""

from typing import Any

import torch
from torch import Tensor

from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.flow import path
from functional_sd3.training.objectives import points
from functional_sd3.training.objectives.types import Loss, Metrics, check_keys
from functional_sd3.training.rewards.advantages import CLIP
from functional_sd3.transformer.mmdit import AttendBlocks

METRICS = ("kl", "old_distance", "ratio_distance")


def awm_loss(
    config: Any,
    *,
    kl: float = 1e-3,
    old: float = 1.0,
    eps: float = 1.0,
    power: float | None = 0.25,
    clip: float = CLIP,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "sdpa",
    attend: AttendBlocks | None = None,
) -> Loss:
    """max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + kl mean (v - v_ref)^2 + old mean (v - v_old)^2, at `points`.

    A = advantage / clip; rho = exp(l - sg l_0), l_0 the same under the policy that drew, whose velocities are
    "behaviour" in the batch; without them the policy itself (one update a batch: the gradient is -A grad l).
    l = -mean (v - (noise - x_0))^2 =: -m, or with a `power` p the robust -((m + 1e-10)^p - 1e-10^p) t / p, "ghuber".
    v_old: a slow average of the policy. dtype, implementation, attend: as in `flow_loss`. Metrics: kl and old_distance
    as in `nft_loss`, ratio_distance mean |rho - 1|.
    """
    velocity_of = points.model_velocity(config, dtype=dtype, implementation=implementation, attend=attend)

    def score(v: Tensor, batch: Tree) -> Tensor:
        error = points.sample_means((v - path.target(batch["latents"], batch["noise"])).square())
        if power is None:
            return -error
        return -((error + 1e-10) ** power - 1e-10**power) * batch["t"] / power

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        points.check_batch(batch, ("latents", "noise", "t", "advantage", "old", "reference"), "awm_loss")
        check_keys(keys, batch["latents"])
        v = velocity_of(params, batch)(points.noised(batch), batch["t"])
        behaviour = batch.get("behaviour", v).detach()
        ratio = torch.exp(score(v, batch) - score(behaviour, batch))
        drift = points.sample_means((v - batch["reference"]).square())
        moved = points.sample_means((v - batch["old"]).square())
        losses = points.clipped(ratio, batch["advantage"] / clip, eps) + kl * drift + old * moved
        distance = (ratio - 1).abs().mean()
        return losses.mean(), {"kl": drift.mean(), "old_distance": moved.mean(), "ratio_distance": distance}

    return loss
