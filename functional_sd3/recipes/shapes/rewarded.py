"""Last stage of `params/tiny`: the transformer learns from its own images, rewarded where they are as the captions say.

DiffusionNFT (Zheng et al. 2025, arXiv:2509.16117) on captions that are not held out, read by the reader of `prompts`.
"""

import torch
from torch import Tensor

from functional_sd3 import pipeline
from functional_sd3.core import prng
from functional_sd3.core.types import Key, Params
from functional_sd3.recipes.shapes import rewards
from functional_sd3.recipes.shapes.architecture import LENGTH
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import reward_methods, reward_settings, reward_task
from functional_sd3.weights.model import Model

STEPS, CFG = 10, 5.0
"""Of the images that are learned from, as of `pipeline.generate`."""
BATCH, GROUP, DRAWS = 64, 8, 2
"""Images that a round learns from, and of each prompt; so many times as many are drawn at most."""


def reward_stage(
    key: Key, model: Model, steps: int, *, rate: float = 1e-4, dtype: torch.dtype | None = None
) -> reward_task.RewardTask:
    """The transformer of a whole model for `steps` rounds, all else frozen. `dtype` is that of the policy that draws.

    What is learned from is drawn with guidance, at the scale that images are drawn with by default: the velocity with
    the caption moves towards what made guided images right. Captions name two things, as images of one thing are
    nearly always right, and groups without spread teach nothing.
    """
    config, device = model.config, torch.device("cpu")
    with torch.no_grad():
        empty = pipeline.encode(model.params, config, model.tokenizers, [""], t5_length=LENGTH).negative

    def noise(keys: Key) -> Tensor:
        return pipeline.initial_noise(keys, config, len(keys), None, None, device=device)

    def draw(params: Params, conditioning: Conditioning, start: Tensor, keys: Key) -> dict[str, Tensor]:
        negative = Conditioning(*(part.expand(len(keys), *part.shape[1:]) for part in empty))
        conditions = pipeline.Conditions(conditioning, negative)
        return {"latents": pipeline.sample(params, config, conditions, start, steps=STEPS, cfg=CFG, key=keys)}

    times = pipeline.sigmas(config, noise(prng.key(0, device=device)[None]), STEPS)
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
            draws=DRAWS,
            rate=rate,
            draw_dtype=dtype,
            at_once=64,
            options=reward_methods.Options(group=GROUP, dtype=dtype),
        ),
        reward=rewards.shapes,
        source=rewards.source(2),
        sampler=reward_methods.Sampler(draw, noise, times, empty, CFG),
        decode=lambda params, latents: pipeline.decode(params, config, latents),
        t5_length=LENGTH,
    )
