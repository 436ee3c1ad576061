"""Preprocessing of images for CLIP's image encoder: shorter side resized, centre cropped, normalised.

Equal to the bit to transformers' `CLIPImageProcessorPil` (`CLIPImageProcessor` without torchvision). Resizing is
Pillow's, on bytes: a tensor is rounded to bytes first, as if it had been saved as PNG.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.image import pixels

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Config:
    """Settings of the preprocessing; the defaults are OpenAI's.

    resize: the shorter side, in pixels; crop: the side of the central square. mean, std: of red, green and blue in
    [0, 1].
    """

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


def apply(config: Config, images: "Image | Sequence[Image] | Tensor", *, square: bool = False) -> Tensor:
    """Preprocessed images (batch, 3, crop, crop), float32.

    images: PIL images of any sizes and modes, or a tensor (batch, 3, height, width) in [0, 1]. Transparency is composed
    over white. square: the centre is cropped before resizing, as CMMD's authors do, instead of after.
    """
    from PIL import Image

    if isinstance(images, Tensor):
        images = pixels.to_pil(images)
    images = [images] if isinstance(images, Image.Image) else list(images)
    if not images:
        return torch.empty(0, 3, config.crop, config.crop, dtype=torch.float32, device="cpu")
    return torch.stack([_preprocess(config, _centre_square(image) if square else image) for image in images])


def resample(config: Config, images: Tensor) -> Tensor:
    """`apply` of a tensor (batch, 3, height, width) in [0, 1] without rounding to bytes: differentiable, and equal to
    it within a byte's unit on average."""
    height, width = images.shape[-2:]
    short = min(height, width)
    size = (int(config.resize * height / short), int(config.resize * width / short))
    resized = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False).clamp(0.0, 1.0)
    top, left = (size[0] - config.crop) // 2, (size[1] - config.crop) // 2
    cropped = resized[..., top : top + config.crop, left : left + config.crop]
    mean, std = (cropped.new_tensor(values)[:, None, None] for values in (config.mean, config.std))
    return (cropped - mean) / std


def _centre_square(image: "Image") -> "Image":
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _preprocess(config: Config, image: "Image") -> Tensor:
    from PIL import Image

    image = pixels.opaque(image)
    width, height = image.size
    short = min(width, height)
    # Truncated, not rounded: a longer side of 299.7 pixels becomes 299.
    size = (int(config.resize * width / short), int(config.resize * height / short))
    resized = numpy.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = (size[1] - config.crop) // 2, (size[0] - config.crop) // 2
    cropped = resized[top : top + config.crop, left : left + config.crop]
    # Operations and roundings in transformers' order: bytes to float32 by way of float64, then mean and deviation.
    scaled = (cropped.astype(numpy.float64) * (1 / 255)).astype(numpy.float32)
    normalised = (scaled - numpy.array(config.mean, numpy.float32)) / numpy.array(config.std, numpy.float32)
    return torch.from_numpy(numpy.ascontiguousarray(normalised.transpose(2, 0, 1)))
