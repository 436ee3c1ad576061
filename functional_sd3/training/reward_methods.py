"""Methods of training by rewards: sampling policy, batch of the rollouts, objective, decay of the old policy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import prng, tree
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.training import copies
from functional_sd3.training.objectives import Loss, nft, points
from functional_sd3.training.schedules import Schedule


@dataclass(frozen=True)
class Options:
    """Hyperparameters of the methods; None: the default of the method, as published.

    times: sampling times that every image is trained at, each with fresh noise. kl: weight of the distance to the
    start. beta: of `nft_loss`. rows: points whose velocities are computed at once.
    """

    times: int = 2
    kl: float | None = None
    beta: float | None = None
    rows: int = 64
    dtype: torch.dtype | None = None


class Policies(NamedTuple):
    """Parameters of three whole models: at the start, the old policy's and the trained ones."""

    start: Params
    old: Params
    current: Params


class RewardMethod(NamedTuple):
    """A method that trains a policy on images and their advantages.

    draws_from: the policy that draws. decay: of the old policy (`copies.soft_update`), by rounds done. batch:
    `(key, rows of a rollout, policies, times of the sampler (steps + 1,)) -> batch of the loss`. metrics: names of the
    loss's.
    """

    loss: Loss
    metrics: tuple[str, ...]
    draws_from: Literal["old", "current"]
    decay: Schedule
    batch: Callable[[Key, Tree, Policies, Tensor], Tree]


def nft_method(config: Any, options: Options) -> RewardMethod:
    """DiffusionNFT with the old policy of its GenEval and PickScore runs: decay min(0.001 round, 0.5)."""
    velocity_of = points.model_velocity(config, dtype=options.dtype)
    loss = nft.nft_loss(config, beta=_given(options.beta, 1.0), kl=_given(options.kl, 1e-4), dtype=options.dtype)

    def batch(key: Key, rows: Tree, policies: Policies, times: Tensor) -> Tree:
        drawn = draw_points(key, rows, times, options.times)
        others = {"old": policies.old, "reference": policies.start}
        return points.add_velocities(velocity_of, drawn, others, rows=options.rows)

    return RewardMethod(loss, nft.METRICS, "old", copies.linear(0.001, 0.5), batch)


METHODS: dict[str, Callable[[Any, Options], RewardMethod]] = {"nft": nft_method}


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
    noise = prng.normal(prng.split(noise_key, len(picks)), tuple(latents.shape[1:]))
    return {**repeated, "t": times.to(latents)[picks], "noise": noise.to(latents)}


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
