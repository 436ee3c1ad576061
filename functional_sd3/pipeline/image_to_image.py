"""From pictures to pictures: noise is added up to a level, and the flow of a prompt leads back from there.

Meng et al. 2022, "SDEdit", arXiv:2108.01073; the result of diffusers' `StableDiffusion3Img2ImgPipeline` for the same
noise and the mean of the VAE's posterior.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from functional_sd3.core.types import Key, Params
from functional_sd3.flow import path, schedule
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.latents import decode, encode_images, initial_noise
from functional_sd3.pipeline.sampling import sample, sigmas
from functional_sd3.pipeline.text_to_image import encode
from functional_sd3.weights.model import Tokenizers

_WORDS = ("negative", "t5_length", "weighted", "long_prompts")


class Begun(NamedTuple):
    """Where a run from pictures starts, and the times it goes through from there."""

    x: Tensor
    times: Tensor


def image_to_image(
    params: Params,
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    images: Tensor,
    key: Key,
    *,
    strength: float = 0.6,
    steps: int = 28,
    noise: Tensor | None = None,
    posterior_key: Key | None = None,
    **options: Any,
) -> Tensor:
    """Pictures of prompts, begun from pictures: (batch, 3, height, width) in [0, 1], float32.

    images (batch, 3, height, width) in [0, 1]; one image or one prompt serves all of the other. strength, in [0, 1]:
    the part of the `steps` that is taken, rounded up to whole ones; 0 gives the pictures back, encoded and decoded, and
    1 is `generate`. Where steps * strength is a whole number it is that number of steps; diffusers computes it in
    binary fractions and takes one more in some cases (of 50 steps at 0.56 it takes 29, not 28). key, noise: as of
    `generate`. posterior_key: draws the latents from the VAE's posterior, as diffusers does; by default its mean is
    taken. options: of `generate`, but for the size, and of `sample`.

    Raises ValueError for a strength outside [0, 1], and for images of other shapes or numbers, or sizes that the model
    cannot draw.
    """
    words, run = divided(options)
    prompts, images = paired(prompts, images)
    if noise is None:
        noise = noise_for(images, key, config, run)
    latents = encode_images(params, config, images, key=posterior_key)
    begun = begin(config, latents, noise, steps, strength)
    conditions = encode(params, config, tokenizers, prompts, **words)
    return decode(params, config, sample(params, config, conditions, begun.x, times=begun.times, key=key, **run))


def begin(config: Config, latents: Tensor, noise: Tensor, steps: int, strength: float) -> Begun:
    """The last part of the config's grid, and the pictures' latents with as much noise as it starts with."""
    times = schedule.partial(sigmas(config, noise, steps), strength)
    return Begun(path.interpolate(latents, noise, times[0]), times)


def divided(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of `encode`, and the rest, which are those of `sample`. Raises ValueError for `generate`'s alone."""
    if alone := sorted({"offload", "device"} & options.keys()):
        raise ValueError(f"{' and '.join(alone)}: only `generate` takes components by turns or moves them")
    words = {name: value for name, value in options.items() if name in _WORDS}
    return words, {name: value for name, value in options.items() if name not in _WORDS}


def paired(prompts: str | Sequence[str], images: Tensor) -> tuple[list[str], Tensor]:
    """As many prompts as images: one of either serves all of the other. Raises ValueError for other numbers."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images of shape {list(images.shape)} must be (batch, 3, height, width)")
    counts = {len(prompts), len(images)} - {1}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts; give one, or one for each")
    count = max(len(prompts), len(images))
    return prompts * (count // len(prompts)), images.expand(count, *images.shape[1:])


def noise_for(images: Tensor, key: Key, config: Config, run: Mapping[str, Any]) -> Tensor:
    """`initial_noise` for pictures of this size; a run with a field of its own may be beyond the table of positions."""
    bounded = run.get("field") is None
    return initial_noise(key, config, len(images), *images.shape[-2:], device=images.device, bounded=bounded)
