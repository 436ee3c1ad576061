"""Pictures -> what CLIP's image encoder reads: shorter side resized, middle cut out, normalised.

To the bit what transformers' `CLIPImageProcessorPil` (`CLIPImageProcessor` without torchvision) makes of a picture.
Resizing is Pillow's, on bytes: an image that is a tensor is rounded to bytes first, as if it had been saved as PNG.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from functional_sd3.image import pixels

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Config:
    """`resize`: the shorter side, in pixels; `crop`: the side of the square cut out of the middle. Mean and standard
    deviation are of pixels in [0, 1], red, green and blue; the defaults are OpenAI's."""

    resize: int = 224
    crop: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize:
            raise ValueError(f"crop {self.crop} must be between 1 and resize {self.resize}")
        if not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"std {self.std} must be above 0 and finite")
        if not all(math.isfinite(value) for value in self.mean):
            raise ValueError(f"mean {self.mean} must be finite")


def apply(config: Config, pictures: "Image | Sequence[Image] | Tensor", *, square: bool = False) -> Tensor:
    """Pictures of any sizes and modes, or images (batch, 3, height, width) in [0, 1] -> (batch, 3, crop, crop) float32.

    Transparency is laid over white. `square`: the middle is cut out before resizing, as CMMD's authors do it, and not
    after.
    """
    from PIL import Image

    if isinstance(pictures, Tensor):
        pictures = pixels.to_pil(pictures)
    pictures = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    if not pictures:
        return torch.empty(0, 3, config.crop, config.crop, dtype=torch.float32, device="cpu")
    return torch.stack([_one(config, _middle(picture) if square else picture) for picture in pictures])


def _middle(picture: "Image") -> "Image":
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def _one(config: Config, picture: "Image") -> Tensor:
    from PIL import Image

    picture = pixels.opaque(picture)
    width, height = picture.size
    short = min(width, height)
    # Cut off, not rounded: a longer side of 299.7 pixels becomes 299.
    size = (int(config.resize * width / short), int(config.resize * height / short))
    resized = numpy.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    top, left = (size[1] - config.crop) // 2, (size[0] - config.crop) // 2
    cut = resized[top : top + config.crop, left : left + config.crop]
    # In their order of operations and roundings: bytes to float32 by way of float64, then mean and deviation.
    scaled = (cut.astype(numpy.float64) * (1 / 255)).astype(numpy.float32)
    normalised = (scaled - numpy.array(config.mean, numpy.float32)) / numpy.array(config.std, numpy.float32)
    return torch.from_numpy(numpy.ascontiguousarray(normalised.transpose(2, 0, 1)))
