"""Ratio objective on the transitions of a stochastic sampler: Flow-GRPO and its forms.

Liu et al. 2025, arXiv:2505.05470 (Flow-GRPO); Wang and Yu 2025, arXiv:2509.05952 (coefficients-preserving sampling);
Li et al. 2025, arXiv:2507.21802 (MixGRPO); Xue et al. 2025, arXiv:2505.07818 (DanceGRPO); Wang et al. 2025,
arXiv:2510.22319 (GRPO-Guard). They differ in the transition, in the steps that are trained on, and in the ratio.
"""

from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key, Params, Tree, Velocity
from functional_sd3.flow import guidance
from functional_sd3.flow.ode import transitions
from functional_sd3.flow.ode.transitions import Rule, Transition
from functional_sd3.flow.times import is_readable
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training.objectives import points
from functional_sd3.training.objectives.points import VelocityOf
from functional_sd3.training.objectives.types import Loss, Metrics, check_keys
from functional_sd3.transformer.mmdit import AttendBlocks

METRICS = ("kl", "ratio", "ratio_distance", "clipped")


def guided_velocity(velocity_of: VelocityOf, negative: Conditioning, scale: float) -> VelocityOf:
    """v_n + scale (v_p - v_n), both with gradients; negative: of one prompt, (1, ...) each. Scale 1: v_p alone."""
    if scale == 1:
        return velocity_of

    def both(params: Params, batch: Tree) -> Velocity:
        count = len(batch["pooled"])
        blank = {name: part.expand(count, *part.shape[1:]) for name, part in negative._asdict().items()}
        return guidance.classifier_free(velocity_of(params, batch), velocity_of(params, blank), scale)

    return both


def transition_of(velocity_of: VelocityOf, rule: Rule, params: Params, batch: Tree) -> Transition:
    """The transition from "x" at "t" to "s" of every row, in float32."""
    x, t, s = batch["x"], batch["t"], batch["s"]
    return rule(x, velocity_of(params, batch)(x, t), t, s)


def add_means(velocity_of: VelocityOf, rule: Rule, batch: Tree, policies: dict[str, Params], *, rows: int = 64) -> Tree:
    """The batch with the means of other policies' transitions under their names, without gradients."""
    with torch.no_grad():
        for name, params in policies.items():
            parts = []
            for start in range(0, len(batch["t"]), rows):
                part = tree.map(lambda leaf, first=start: leaf[first : first + rows], batch)
                parts.append(transition_of(velocity_of, rule, params, part).mean)
            batch = {**batch, name: torch.cat(parts)}
    return batch


def ratio_loss(
    config: Any,
    rule: Rule,
    *,
    eps: float = 1e-4,
    kl: float = 0.04,
    guard: bool = False,
    is_residual: bool = False,
    negative: Conditioning | None = None,
    cfg: float = 1.0,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "sdpa",
    attend: AttendBlocks | None = None,
) -> Loss:
    """max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + kl mean (mean - mean_ref)^2 / (2 sigma^2) of sampled transitions.

    batch: a row a transition: x, x_next, the old policy's and the start's means of it, old_mean and reference_mean,
    (batch, channels, height, width); t, s, advantage (batch,); context, pooled. rule: the sampler's transition, std =
    sigma sqrt(t - s). rho = exp(log p - log p_old), log p the mean over a sample's numbers, as in the authors' code:
    hence the small `eps`. is_residual: log p = -mean (x_next - mean)^2, as coefficients-preserving sampling has it.
    guard: rho = exp(<noise, mean - mean_old>), centred at 1, and the loss over t - s (GRPO-Guard). negative, cfg:
    guidance of the sampler, whose two velocities are both differentiated. attend: as in `flow_loss`. Raises ValueError
    for a transition that draws nothing and so has no density (where its values are in CPU memory). Metrics: kl, the
    unweighted term; ratio and ratio_distance, mean rho and |rho - 1|; clipped, the share of rows where the clip holds.
    """
    if guard and is_residual:
        raise ValueError("guard centres the ratio of Gaussian densities: it does not go with is_residual")
    if cfg != 1 and negative is None:
        raise ValueError(f"cfg {cfg} needs the conditioning of the negative prompt")
    velocity_of = points.model_velocity(config, dtype=dtype, implementation=implementation, attend=attend)
    if negative is not None:
        velocity_of = guided_velocity(velocity_of, negative, cfg)

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        names = ("x", "x_next", "t", "s", "old_mean", "reference_mean", "advantage")
        points.check_batch(batch, names, "ratio_loss")
        check_keys(keys, batch["x"])
        mean, std = transition_of(velocity_of, rule, params, batch)
        if is_readable(std) and not (std > 0).all():
            raise ValueError("a transition that draws nothing has no density: train on steps with noise alone")
        length = batch["t"] - batch["s"]
        old = Transition(batch["old_mean"], std)
        log_ratio = _log_ratio(batch["x_next"], Transition(mean, std), old, guard=guard, is_residual=is_residual)
        ratio, advantage = torch.exp(log_ratio), batch["advantage"]
        losses = points.clipped(ratio, advantage, eps)
        if guard:
            losses = losses / length
        sigma_square = std.square() / length
        drift = points.sample_means((mean - batch["reference_mean"]).square()) / (2 * sigma_square)
        is_clipped = torch.where(advantage > 0, ratio > 1 + eps, ratio < 1 - eps) & (advantage != 0)
        return (losses + kl * drift).mean(), {
            "kl": drift.mean(),
            "ratio": ratio.mean(),
            "ratio_distance": (ratio - 1).abs().mean(),
            "clipped": is_clipped.to(ratio.dtype).mean(),
        }

    return loss


def _log_ratio(x: Tensor, new: Transition, old: Transition, *, guard: bool, is_residual: bool) -> Tensor:
    if is_residual:
        return points.sample_means((x - old.mean).square()) - points.sample_means((x - new.mean).square())
    if guard:
        # s (log p - log p_old + |mean - mean_old|^2 / 2 s^2), the squares cancelled by hand: exact for equal means.
        return points.sample_means((x - old.mean) * (new.mean - old.mean)) / new.std
    return transitions.mean_log_density(x, new) - transitions.mean_log_density(x, old)
