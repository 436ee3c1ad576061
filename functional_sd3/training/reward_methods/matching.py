"""DiffusionNFT and advantage-weighted matching: at fresh noise on drawn images, by any sampler."""

from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import prng, tree
from functional_sd3.core.types import Key, Tree
from functional_sd3.training import copies
from functional_sd3.training.objectives import awm, nft, points, policy
from functional_sd3.training.reward_methods.types import Options, Policies, RewardMethod, Sampler, given


def nft_method(config: Any, options: Options, sampler: Sampler) -> RewardMethod:
    """DiffusionNFT; the slow copy draws, with the decay of its GenEval and PickScore runs, min(0.001 round, 0.5)."""
    cfg = sampler.cfg if options.guided else 1.0
    unguided = points.model_velocity(config, dtype=options.dtype, attend=options.attend)
    velocity_of = policy.guided_velocity(unguided, sampler.negative, cfg)
    loss = nft.nft_loss(
        config, beta=given(options.beta, 1.0), kl=given(options.kl, 1e-4), negative=sampler.negative, cfg=cfg,
        dtype=options.dtype, attend=options.attend,
    )  # fmt: skip

    def batch(key: Key, rows: Tree, policies: Policies) -> Tree:
        sampled = draw_points(key, rows, sampler.times, options.times)
        others = {"old": policies.old, "reference": policies.start}
        return points.add_velocities(velocity_of, sampled, others, rows=options.rows)

    return RewardMethod(loss, nft.METRICS, "old", copies.linear(0.001, 0.5), lambda number, key: sampler.draw, batch)


def awm_method(config: Any, options: Options, sampler: Sampler) -> RewardMethod:
    """Advantage-weighted matching; the trained policy draws, its slow average, of decay min(0.001 round, 0.3), holds it
    back."""
    velocity_of = points.model_velocity(config, dtype=options.dtype, attend=options.attend)
    loss = awm.awm_loss(
        config, kl=given(options.kl, 1e-3), eps=given(options.eps, 1.0), dtype=options.dtype, attend=options.attend
    )

    def batch(key: Key, rows: Tree, policies: Policies) -> Tree:
        sampled = draw_points(key, rows, sampler.times, options.times)
        others = {"old": policies.old, "reference": policies.start}
        if options.updates > 1:
            others["behaviour"] = policies.current
        return points.add_velocities(velocity_of, sampled, others, rows=options.rows)

    decay = copies.linear(0.001, 0.3)
    return RewardMethod(loss, awm.METRICS, "current", decay, lambda number, key: sampler.draw, batch)


def draw_points(key: Key, rows: Tree, times: Tensor, count: int) -> Tree:
    """`count` rows for each image: "t", that many different ones of the sampler's times, and fresh "noise".

    times (steps + 1,): the last, where nothing is evaluated, is left out. Raises ValueError for more than there are.
    """
    steps, latents = len(times) - 1, rows["latents"]
    if not 1 <= count <= steps:
        raise ValueError(f"times {count} must be from 1 to {steps}, the number of sampling steps")
    time_key, noise_key = prng.split(key.to(latents.device)).unbind(-2)
    keys = prng.split(time_key, len(latents))
    picks = prng.permutation(keys, steps)[:, :count].flatten()
    repeated = tree.map(lambda leaf: leaf.repeat_interleave(count, 0), rows)
    return {**repeated, "t": times.to(latents)[picks], "noise": fresh_noise(noise_key, repeated["latents"])}


def fresh_noise(key: Key, latents: Tensor) -> Tensor:
    """Noise shaped like latents, each row's from a key of its own."""
    return prng.normal(prng.split(key, len(latents)), tuple(latents.shape[1:]), torch.float32).to(latents)
