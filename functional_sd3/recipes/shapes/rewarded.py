"""Stage of `params/tiny` and of `params/tiny-4`: the transformer learns from its own images, rewarded where they are
as the captions say.

DiffusionNFT (Zheng et al. 2025, arXiv:2509.16117) on captions that are not held out, read by the reader of `prompts`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3 import pipeline
from functional_sd3.core import prng, tree
from functional_sd3.core.types import Key, Params
from functional_sd3.recipes.shapes import rewards
from functional_sd3.recipes.shapes.architecture import LENGTH
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import reward_methods, reward_settings, reward_task
from functional_sd3.weights.model import Model

BATCH, GROUP = 64, 8
"""Images that a round learns from, and of each prompt."""


class Policy(NamedTuple):
    """Settings of the images that are learned from, and of their training.

    steps: numbers of them, each for an equal part of a round's prompts; each divides the first. cfg: scale of guidance;
    above 1 it is the guided velocity that is trained. rate: learning rate. divergence: weight of the squared distance
    from the start's velocity. things: objects in the captions, None for the mixture of training. draws: at most so many
    times as many images are drawn as are learned from.
    """

    steps: Sequence[int]
    cfg: float
    rate: float
    divergence: float
    things: int | None = None
    draws: int = 3


UNGUIDED = Policy((8,), 1.0, 1e-4, 1e-4, things=2, draws=4)
"""Cheap rounds, whose model is right more often with guidance too, but less diverse, and overdone at full weight."""
GUIDED = Policy((10,), 5.0, 4e-5, 0.01)
"""As images are drawn by default, in fewer steps. A change of the velocity is five times as large after guidance."""


def reward_stage(
    key: Key, model: Model, steps: int, policy: Policy, *, dtype: torch.dtype | None = None
) -> reward_task.RewardTask:
    """The transformer of a model for `steps` rounds, all else frozen; `dtype` is that of the policy that draws."""
    config, device = model.config, torch.device("cpu")
    with torch.no_grad():
        empty = pipeline.encode(model.params, config, model.tokenizers, [""], t5_length=LENGTH).negative

    def noise(keys: Key) -> Tensor:
        return pipeline.initial_noise(keys, config, len(keys), None, None, device=device)

    def draw(params: Params, conditioning: Conditioning, start: Tensor, keys: Key) -> dict[str, Tensor]:
        parts = []
        for count, rows in zip(policy.steps, _parts(len(keys), len(policy.steps)), strict=True):
            own = Conditioning(*(part[rows] for part in conditioning))
            negative = Conditioning(*(part.expand(len(keys[rows]), *part.shape[1:]) for part in empty))
            conditions = pipeline.Conditions(own, negative)
            latents = pipeline.sample(
                params, config, conditions, start[rows], steps=count, cfg=policy.cfg, key=keys[rows]
            )
            parts.append(latents)
        return {"latents": torch.cat(parts)}

    times = pipeline.sigmas(config, noise(prng.key(0, device=device)[None]), policy.steps[0])
    return reward_task.reward_task(
        key,
        model,
        reward_settings.Settings(
            method="nft",
            steps=steps,
            weights={"right": 1.0},
            default_weight=0.0,
            batch=BATCH,
            group=GROUP,
            draws=policy.draws,
            rate=policy.rate,
            draw_dtype=dtype,
            at_once=64,
            options=reward_methods.Options(group=GROUP, kl=policy.divergence, guided=policy.cfg != 1),
        ),
        reward=rewards.shapes,
        source=rewards.source(policy.things),
        sampler=reward_methods.Sampler(draw, noise, times, empty, policy.cfg),
        decode=lambda params, latents: pipeline.decode(params, config, latents),
        t5_length=LENGTH,
    )


def add_changes(start: Model, ends: Sequence[tuple[float, Model]]) -> Model:
    """start + sum of weight (end - start) of the transformers (Ilharco et al. 2022, arXiv:2212.04089)."""
    transformer = start.params["transformer"]
    total = transformer
    for weight, end in ends:
        total = tree.map(
            lambda sum, new, old, weight=weight: sum + weight * (new - old),
            total,
            end.params["transformer"],
            transformer,
        )
    return start._replace(params={**start.params, "transformer": total})


def _parts(count: int, parts: int) -> list[slice]:
    """Rows of each of so many parts of whole groups, as equal as they can be."""
    groups = count // GROUP
    ends = [groups * part // parts * GROUP for part in range(parts)] + [count]
    return [slice(start, end) for start, end in zip(ends[:-1], ends[1:], strict=True)]
