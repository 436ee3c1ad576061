"""Preprocessing of images for the Inception network of FID, as published scores were computed.

The modes differ in resizing to 299 x 299 and in scaling, so their scores must not be compared with each other:

- `pytorch_fid` (pytorch-fid): bilinear without antialiasing, 2 x - 1 of pixels in [0, 1];
- `clean` (clean-fid; Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation"): Pillow's
  antialiased bicubic on floats, clipped and not rounded again, (x - 128) / 128 of pixels in [0, 255];
- `tf1` (torch-fidelity, and torchmetrics with antialias=False): the bilinear resizing of TensorFlow 1, which samples
  at i * size / 299 without a half pixel's offset, (x - 128) / 128.

For upright, opaque 8-bit images each equals its package bit for bit. With other images the packages drop transparency,
clip 16 bits to 8 and ignore the EXIF orientation; `image.files.read` does none of that.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 299


def pytorch_fid(images: Tensor) -> Tensor:
    """images (..., 3, height, width), uint8, or floats in [0, 1] -> (..., 3, 299, 299) float32 in [-1, 1]."""
    batch = _batch(images)
    floats = batch.float() / 255.0 if batch.dtype == torch.uint8 else batch.float()
    resized = F.interpolate(floats, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return (2.0 * resized - 1.0).reshape(*images.shape[:-2], SIZE, SIZE)


def clean(images: Tensor) -> Tensor:
    """Inputs of the network by clean-fid's rules, shaped as in `pytorch_fid`; on the CPU and not differentiable."""
    from PIL import Image

    channels = _bytes_as_floats(_batch(images)).detach().flatten(0, 1).cpu().numpy()
    resized = [
        numpy.asarray(Image.fromarray(channel).resize((SIZE, SIZE), Image.Resampling.BICUBIC)).clip(0.0, 255.0)
        for channel in channels
    ]
    stacked = torch.from_numpy(numpy.stack(resized) if resized else numpy.empty((0, SIZE, SIZE), numpy.float32))
    return ((stacked.to(images.device) - 128.0) / 128.0).reshape(*images.shape[:-2], SIZE, SIZE)


def tf1(images: Tensor) -> Tensor:
    """Inputs of the network by the rules of its original graph, shaped as in `pytorch_fid`."""
    floats = _bytes_as_floats(_batch(images))
    resized = _sample(_sample(floats, dim=-1), dim=-2)
    return ((resized - 128.0) / 128.0).reshape(*images.shape[:-2], SIZE, SIZE)


MODES: dict[str, Callable[[Tensor], Tensor]] = {"pytorch_fid": pytorch_fid, "clean": clean, "tf1": tf1}


def image(image: "Image", *, mode: str = "clean") -> Tensor:
    """One RGB image of any size -> (3, 299, 299) float32 in [-1, 1]."""
    return MODES[mode](torch.from_numpy(numpy.array(image)).permute(2, 0, 1))


def _batch(images: Tensor) -> Tensor:
    if images.ndim < 3 or images.shape[-3] != 3 or 0 in images.shape[-2:]:
        raise ValueError(f"images of shape {list(images.shape)} must be (..., 3, height, width)")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images of dtype {images.dtype} must be uint8, or floats in [0, 1]")
    return images.reshape(-1, *images.shape[-3:])


def _bytes_as_floats(batch: Tensor) -> Tensor:
    """Floats in [0, 255]; float images are not rounded to bytes first."""
    return batch.float() if batch.dtype == torch.uint8 else batch.float() * 255.0


def _sample(x: Tensor, dim: int) -> Tensor:
    """TensorFlow 1's bilinear resizing along one dimension, in its order of roundings."""
    size = x.shape[dim]
    step = torch.tensor(size / SIZE, dtype=torch.float32, device=x.device)
    place = torch.arange(SIZE, dtype=torch.float32, device=x.device) * step
    low = place.long()
    weight = (place - low).reshape(-1, *[1] * (-dim - 1))
    before = x.index_select(dim, low)
    return before + (x.index_select(dim, (low + 1).clamp(max=size - 1)) - before) * weight
