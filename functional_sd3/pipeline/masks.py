"""Masks: images (batch or 1, 1, height, width) in [0, 1], 1 where something is painted anew, 0 where it is kept.

The kept part follows the straight path from its noise to itself while the rest follows the flow, so that the model
always sees a whole image of one noise level: for Euler steps that is the latent blend of diffusers'
`StableDiffusion3InpaintPipeline`, and it is a velocity like any other for every other integrator.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core.types import Velocity
from functional_sd3.flow import path
from functional_sd3.flow.path import broadcast
from functional_sd3.image import gaussian


def check(mask: Tensor, height: int, width: int, batch: int) -> None:
    """Raises ValueError for a mask of other proportions than images of this size, or of another number."""
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, batch):
        raise ValueError(f"mask of shape {list(mask.shape)} must be (batch or 1, 1, height, width), batch {batch}")
    tall, wide = mask.shape[-2:]
    if tall * width != wide * height:
        raise ValueError(
            f"mask of {wide} x {tall} for images of {width} x {height}: any size will do, but of the same proportions"
        )


def hard(mask: Tensor, height: int, width: int) -> Tensor:
    """The mask as 0 or 1, (batch or 1, 1, height, width): 1 from one half on, by the nearest pixel at the upper left.

    So diffusers resizes masks to latents.
    """
    return F.interpolate((mask >= 0.5).float(), (height, width))


def soft(mask: Tensor, height: int, width: int, blur: float = 0.0) -> Tensor:
    """The mask in [0, 1], (batch or 1, 1, height, width), blurred first by `blur` of its pixels.

    Smaller by the mean of the pixels that fall on a place, larger by bilinear interpolation.
    """
    mask = blurred(mask.float(), blur)
    if height > mask.shape[-2]:
        return F.interpolate(mask, (height, width), mode="bilinear", align_corners=False)
    return F.interpolate(mask, (height, width), mode="area")


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Images (..., height, width) convolved with a Gaussian of standard deviation `sigma` in pixels, cut off at 3
    sigma; the border is repeated. Raises ValueError for a negative sigma."""
    check_blur(sigma)
    reach = math.ceil(3 * sigma)
    if not reach:
        return images
    return gaussian.blur(images, sigma, reach, border="replicate")


def check_blur(sigma: float) -> None:
    """Raises ValueError for a negative or infinite standard deviation."""
    if sigma < 0 or not math.isfinite(sigma):
        raise ValueError(f"a blur of {sigma} pixels must be a number of at least 0")


def latent_mask(mask: Tensor, latents: Tensor, soften: float | None) -> Tensor:
    """The mask (batch or 1, 1, height, width) at the size of the latents, or of images; `soften` as in `inpaint`."""
    height, width = latents.shape[-2:]
    return hard(mask, height, width) if soften is None else soft(mask, height, width, soften)


def unmask_times(mask: Tensor, grid: Tensor) -> Tensor:
    """The time at which each place of a mask begins to follow the flow, shaped like the mask.

    For m it is the first time of the last part of the grid that `schedule.partial` gives for the strength m; above all
    times for 1, below them for 0.
    """
    steps = len(grid) - 1
    taken = torch.ceil((mask.double() * steps * 1e6).round() / 1e6).long().clamp(0, steps)
    return torch.where(taken == 0, -1.0, torch.where(taken == steps, 2.0, grid[steps - taken]))


def keep_masked(latents: Tensor, noise: Tensor, unmasked: Tensor) -> Callable[[Velocity], Velocity]:
    """Velocity -> velocity: until its time in `unmasked` a place goes straight from its noise to its image.

    latents, noise (batch, channels, height, width); unmasked (batch or 1, 1, height, width) of `unmask_times`.
    """
    straight = path.target(latents, noise)

    def transform(velocity: Velocity) -> Velocity:
        def masked(x: Tensor, t: Tensor) -> Tensor:
            return torch.where(broadcast(t, x) <= unmasked, velocity(x, t).to(straight.dtype), straight)

        return masked

    return transform


def restore_kept(painted: Tensor, images: Tensor, mask: Tensor, soften: float | None = None) -> Tensor:
    """`images` where the mask keeps them, `painted` elsewhere, (batch, 3, height, width); grey mixes them."""
    return images + latent_mask(mask, images, soften) * (painted - images)


def extend_canvas(
    images: Tensor, *, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0, overlap: int = 0
) -> tuple[Tensor, Tensor]:
    """A larger canvas, filled from the images' borders, and the mask (1, 1, height, width) of what is new on it."""
    margins = (left, right, top, bottom)
    if min(margins) < 0 or overlap < 0:
        raise ValueError(f"margins {margins} and overlap {overlap} must be at least 0 pixels")
    height, width = images.shape[-2:]
    if 2 * overlap >= min(height, width):
        raise ValueError(f"an overlap of {overlap} pixels leaves nothing of an image of {width} x {height}")
    mask = torch.zeros(1, 1, height, width, dtype=images.dtype, device=images.device)
    for axis, (before, after) in ((-1, (left, right)), (-2, (top, bottom))):
        size = mask.shape[axis]
        if before:
            mask.narrow(axis, 0, overlap).fill_(1)
        if after:
            mask.narrow(axis, size - overlap, overlap).fill_(1)
    return F.pad(images, margins, mode="replicate"), F.pad(mask, margins, value=1.0)
