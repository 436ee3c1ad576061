"""Direct preference optimisation of a velocity on pairs of a better and a worse sample of one prompt.

Wallace et al. 2023, arXiv:2311.12908 (Diffusion-DPO), for rectified flows as Liu et al. 2025, arXiv:2501.13918
(Flow-DPO), with a constant weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.flow import path
from functional_sd3.training.objectives import points
from functional_sd3.training.objectives.types import Loss, Metrics, check_keys
from functional_sd3.transformer.mmdit import AttendBlocks

METRICS = ("kl", "winner_error", "loser_error", "margin", "accuracy")
SIDES = ("winner", "loser")


def dpo_loss(
    config: Any,
    *,
    beta: float = 100.0,
    anchor: float = 0.0,
    kl: float = 0.0,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "sdpa",
    attend: AttendBlocks | None = None,
) -> Loss:
    """-log sigmoid(-beta / 2 (d(winner) - d(loser))) + anchor m(winner) + kl mean (v - v_start)^2 at the winner.

    d(x_0) = m(x_0) under the policy less that under the reference, m = mean (v(x_t, t) - (noise - x_0))^2, with the
    same noise and t for both. batch: winner, loser (pairs, channels, height, width): their latents; noise, t; context,
    pooled of the prompt; winner_old, loser_old: velocities of the reference at the two x_t; and "reference", that of
    the start at the winner's, which without one is the reference. anchor: the flow loss of the winners, against both
    errors growing while their difference shrinks. attend: as in `flow_loss`. Metrics: kl; winner_error and loser_error,
    m; margin, mean d(loser) - d(winner); accuracy, the share of pairs where that is positive.
    """
    if not beta > 0:
        raise ValueError(f"beta {beta} must be positive")
    velocity_of = points.model_velocity(config, dtype=dtype, implementation=implementation, attend=attend)

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        points.check_batch(batch, ("winner", "loser", "noise", "t", "winner_old", "loser_old"), "dpo_loss")
        check_keys(keys, batch["winner"])
        # One evaluation of both: the two halves of a batch twice as large.
        twice = {name: torch.cat([batch[name]] * 2) for name in ("context", "pooled", "t")}
        x = torch.cat([points.noised(batch, side) for side in SIDES])
        velocities = velocity_of(params, twice)(x, twice["t"]).chunk(2)
        errors, differences = {}, {}
        for side, v in zip(SIDES, velocities, strict=True):
            target = path.target(batch[side], batch["noise"])
            errors[side] = points.sample_means((v - target).square())
            differences[side] = errors[side] - points.sample_means((batch[f"{side}_old"] - target).square())
        margin = differences["loser"] - differences["winner"]
        start = batch.get("reference", batch["winner_old"])
        drift = points.sample_means((velocities[0] - start).square())
        losses = -F.logsigmoid(beta / 2 * margin) + anchor * errors["winner"] + kl * drift
        return losses.mean(), {
            "kl": drift.mean(),
            "winner_error": errors["winner"].mean(),
            "loser_error": errors["loser"].mean(),
            "margin": margin.mean(),
            "accuracy": (margin > 0).to(margin.dtype).mean(),
        }

    return loss


def add_references(
    config: Any,
    batch: Tree,
    reference: Params,
    start: Params | None = None,
    *,
    rows: int = 64,
    dtype: torch.dtype | None = None,
    attend: AttendBlocks | None = None,
) -> Tree:
    """The batch of pairs with winner_old and loser_old, the velocities of `reference`, and "reference", those of
    `start`; `rows` points are computed at once, without gradients. attend: as in `dpo_loss`."""
    velocity_of = points.model_velocity(config, dtype=dtype, attend=attend)
    for side in SIDES:
        own = {**batch, "latents": batch[side]}
        policies = {"old": reference} | ({"start": start} if side == "winner" and start is not None else {})
        velocities = points.add_velocities(velocity_of, own, policies, rows=rows)
        batch = {**batch, f"{side}_old": velocities["old"]}
        if "start" in policies:
            batch = {**batch, "reference": velocities["start"]}
    return batch


def best_and_worst(rows: Tree, size: int) -> Tree:
    """Pairs of a rollout's rows: winner and loser of each group of `size` images, and their conditioning."""
    rewards = rows["reward"].unflatten(0, (-1, size))
    first = torch.arange(0, rewards.numel(), size, dtype=torch.int64, device=rewards.device)
    best, worst = first + rewards.argmax(1), first + rewards.argmin(1)
    pairs = {"winner": rows["latents"][best], "loser": rows["latents"][worst]}
    return pairs | {name: rows[name][best] for name in ("context", "pooled")}
