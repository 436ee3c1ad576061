"""Gaussian blur of images as a separable convolution."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def blur(images: Tensor, sigma: float, reach: int, *, border: Literal["valid", "replicate"]) -> Tensor:
    """Images (..., height, width) convolved with a Gaussian of standard deviation `sigma`, cut off at `reach` pixels.

    The weights sum to 1. border: "valid" leaves out the `reach` pixels at each border, "replicate" repeats the
    outermost pixel, so that the size stays.
    """
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    weights = torch.softmax(-offsets.square() / (2 * sigma**2), 0)
    # One axis after the other: padding both at once takes memory that grows with the square of a large reach.
    for axis in (-1, -2):
        moved = images.movedim(axis, -1)
        lines = moved.flatten(0, -2)[:, None]
        if border == "replicate":
            lines = F.pad(lines, (reach, reach), mode="replicate")
        images = F.conv1d(lines, weights[None, None]).unflatten(0, moved.shape[:-1]).squeeze(-2).movedim(-1, axis)
    return images
