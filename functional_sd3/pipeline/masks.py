"""Masks: pictures (batch or 1, 1, height, width) in [0, 1], 1 where something is painted anew, 0 where it is kept."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def checked(mask: Tensor, height: int, width: int, batch: int) -> Tensor:
    """The mask, for pictures of this size; ValueError for one of other proportions, or of another number."""
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, batch):
        raise ValueError(f"mask of shape {list(mask.shape)} must be (batch or 1, 1, height, width), batch {batch}")
    tall, wide = mask.shape[-2:]
    if tall * width != wide * height:
        raise ValueError(
            f"mask of {wide} x {tall} for images of {width} x {height}: any size will do, but of the same proportions"
        )
    return mask


def hard(mask: Tensor, height: int, width: int) -> Tensor:
    """0 or 1 at another size: what is at least half white is 1, and every place takes the nearest pixel to its upper
    left, which is what diffusers does on the way to latents."""
    return F.interpolate((mask >= 0.5).float(), (height, width))


def soft(mask: Tensor, height: int, width: int, blur: float = 0.0) -> Tensor:
    """Grey at another size, blurred first by `blur` pixels of the mask: the mean of the pixels that fall on a place, or
    between pixels where there are fewer of them."""
    mask = blurred(mask.float(), blur)
    if height > mask.shape[-2]:
        return F.interpolate(mask, (height, width), mode="bilinear", align_corners=False)
    return F.interpolate(mask, (height, width), mode="area")


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Convolved with a Gaussian of standard deviation `sigma` in pixels, cut off at 3 sigma; the border goes on as it
    is. Raises ValueError for a negative sigma."""
    if sigma < 0 or not math.isfinite(sigma):
        raise ValueError(f"a blur of {sigma} pixels must be a number of at least 0")
    reach = math.ceil(3 * sigma)
    if not reach:
        return images
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.softmax(-offsets.square() / (2 * sigma**2), 0)
    for axis in (-1, -2):
        moved = images.movedim(axis, -1)
        padded = F.pad(moved.flatten(0, -2)[:, None], (reach, reach), mode="replicate")
        images = F.conv1d(padded, kernel[None, None]).reshape(moved.shape).movedim(-1, axis)
    return images
