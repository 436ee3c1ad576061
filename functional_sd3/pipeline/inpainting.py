"""Painting a part of a picture anew, and beyond its borders.

What is kept follows the straight path from its noise to itself while the rest follows the flow, so that the model
always sees a whole picture of one noise level: for Euler steps that is the latent blend of diffusers'
`StableDiffusion3InpaintPipeline`, and it is a velocity like any other for every other integrator.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core.types import Key, Params, Velocity
from functional_sd3.flow import path
from functional_sd3.flow.path import broadcast
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline import masks
from functional_sd3.pipeline.image_to_image import begin, divided, noise_for, paired
from functional_sd3.pipeline.latents import decode, encode_images
from functional_sd3.pipeline.sampling import sample, sigmas
from functional_sd3.pipeline.text_to_image import encode
from functional_sd3.weights.model import Tokenizers


def inpaint(
    params: Params,
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    images: Tensor,
    mask: Tensor,
    key: Key,
    *,
    strength: float = 1.0,
    soften: float | None = None,
    restore: bool = False,
    steps: int = 28,
    noise: Tensor | None = None,
    posterior_key: Key | None = None,
    **options: Any,
) -> Tensor:
    """Pictures painted anew where a mask is white: (batch, 3, height, width) in [0, 1], float32.

    mask (batch or 1, 1, any height, any width of the pictures' proportions), in [0, 1]. By default it is hard: what is
    at least half white is painted, each latent as the mask's pixel at its upper left says (`masks.hard`). soften: takes
    grey for what lies between, a `strength` of its own for each latent (Levin and Fried 2023, arXiv:2306.00950), after
    a blur of so many pixels of the mask, 0 for none (`masks.soft`). restore: lays what is kept of the pictures over the
    result, pixel by pixel, since encoding and decoding alters it a little. The rest as in `image_to_image`; strength is
    1 here, which diffusers takes to be 0.6. Its latents are equal; its pictures are a little off, for it does not add
    the VAE's shift before it decodes (0.42).

    Raises ValueError as `image_to_image`, and for a mask of other proportions or another number.
    """
    words, run = divided(options)
    prompts, images = paired(prompts, images)
    mask = masks.checked(mask, *images.shape[-2:], len(images)).to(images)
    if noise is None:
        noise = noise_for(images, key, config, run)
    latents = encode_images(params, config, images, key=posterior_key)
    begun = begin(config, latents, noise, steps, strength)
    release = release_times(latent_mask(mask, latents, soften), sigmas(config, noise, steps))
    conditions = encode(params, config, tokenizers, prompts, **words)
    hold = holding(latents, noise, release)
    run |= {"times": begun.times, "transform": hold, "key": key}
    drawn = decode(params, config, sample(params, config, conditions, begun.x, **run))
    return restored(drawn, images, mask, soften) if restore else drawn


def outpaint(
    params: Params,
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    images: Tensor,
    key: Key,
    *,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    overlap: int = 0,
    **options: Any,
) -> Tensor:
    """Pictures continued beyond their borders by so many pixels: `inpaint` on a larger canvas.

    overlap: so many pixels inside the old border are painted anew too, for a seam that fits. options: of `inpaint`.
    Raises ValueError where the canvas is of a size that the model cannot draw.
    """
    canvas, mask = grown(images, left=left, right=right, top=top, bottom=bottom, overlap=overlap)
    return inpaint(params, config, tokenizers, prompts, canvas, mask, key, **options)


def grown(
    images: Tensor, *, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0, overlap: int = 0
) -> tuple[Tensor, Tensor]:
    """A larger canvas, filled from the pictures' borders, and the mask (1, 1, height, width) of what is new on it."""
    margins = (left, right, top, bottom)
    if min(margins) < 0 or overlap < 0:
        raise ValueError(f"margins {margins} and overlap {overlap} must be at least 0 pixels")
    height, width = images.shape[-2:]
    if 2 * overlap >= min(height, width):
        raise ValueError(f"an overlap of {overlap} pixels leaves nothing of an image of {width} x {height}")
    kept = torch.zeros(1, 1, height, width, dtype=images.dtype, device=images.device)
    for axis, (before, after) in ((-1, (left, right)), (-2, (top, bottom))):
        size = kept.shape[axis]
        if before:
            kept.narrow(axis, 0, overlap).fill_(1)
        if after:
            kept.narrow(axis, size - overlap, overlap).fill_(1)
    return F.pad(images, margins, mode="replicate"), F.pad(kept, margins, value=1.0)


def latent_mask(mask: Tensor, latents: Tensor, soften: float | None) -> Tensor:
    """The mask at the size of the latents; `soften` as of `inpaint`."""
    size = latents.shape[-2:]
    return masks.hard(mask, *size) if soften is None else masks.soft(mask, *size, soften)


def release_times(mask: Tensor, grid: Tensor) -> Tensor:
    """When each place of a mask begins to move, shaped like it: for m the first time of the last part of the grid that
    `schedule.partial` gives for the strength m; above all times for 1, below them for 0."""
    steps = len(grid) - 1
    taken = torch.ceil((mask.double() * steps * 1e6).round() / 1e6).long().clamp(0, steps)
    return torch.where(taken == 0, -1.0, torch.where(taken == steps, 2.0, grid[steps - taken]))


def holding(latents: Tensor, noise: Tensor, release: Tensor) -> Any:
    """Velocity -> velocity: until the time of its release a place goes straight from its noise to its picture.

    latents, noise (batch, channels, height, width); release (batch or 1, 1, height, width), a time or beyond.
    """
    kept = path.target(latents, noise)

    def transform(velocity: Velocity) -> Velocity:
        def held(x: Tensor, t: Tensor) -> Tensor:
            return torch.where(broadcast(t, x) <= release, velocity(x, t).to(kept.dtype), kept)

        return held

    return transform


def restored(drawn: Tensor, images: Tensor, mask: Tensor, soften: float | None = None) -> Tensor:
    """`images` where the mask keeps them, `drawn` elsewhere, (batch, 3, height, width); grey mixes them."""
    size = images.shape[-2:]
    share = masks.hard(mask, *size) if soften is None else masks.soft(mask, *size, soften)
    return images + share * (drawn - images)
