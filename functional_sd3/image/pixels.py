"""Conversions between PIL images, bytes and tensors.

One rounding rule everywhere: a float in [0, 1] becomes the byte round(255 * x), halves to even, after clamping; a byte
becomes byte / 255. Every byte survives the round trip. (Stability's reference truncates instead; diffusers rounds.)
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from functional_sd3.core.checks import check_channels, check_floating
from functional_sd3.image import depth

if TYPE_CHECKING:
    from PIL.Image import Image


def to_bytes(images: Tensor) -> Tensor:
    """Floats in [0, 1], any shape -> uint8. Values outside are clamped; NaN is a ValueError, and so are integers."""
    check_floating("images", images, ", in [0, 1]: pixels.from_bytes(images) of bytes")
    if torch.isnan(images).any():
        raise ValueError("images hold NaN; the model or its input is broken (a half-precision overflow?)")
    return (images.float().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [0, 1]. Raises ValueError for another dtype."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images of dtype {images.dtype} must be uint8, bytes of 0 to 255")
    return images.float() / 255.0


def to_signed(images: Tensor) -> Tensor:
    """Floats of any shape, [0, 1] -> [-1, 1], the range of the VAE's inputs. Raises ValueError for integers."""
    check_floating("images", images, ", in [0, 1]: pixels.from_bytes(images) of bytes")
    return images * 2.0 - 1.0


def from_signed(images: Tensor) -> Tensor:
    """Floats of any shape, [-1, 1] -> [0, 1], clamped: for the VAE's outputs."""
    return (images * 0.5 + 0.5).clamp(0.0, 1.0)


def to_pil(images: Tensor) -> list["Image"]:
    """images (batch, 3, height, width) in [0, 1] -> one RGB PIL image each."""
    from PIL import Image

    check_channels("images", images, 3)
    arrays = to_bytes(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def from_pil(images: "Image | Sequence[Image]") -> Tensor:
    """PIL images of one size -> (batch, 3, height, width) float32 in [0, 1].

    Greyscale, 16 bits included, and palettes become RGB; transparency is composed over white.
    """
    from PIL import Image

    images = [images] if isinstance(images, Image.Image) else list(images)
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"images must be of one size to form a batch, got {sorted(sizes)}")
    arrays = [numpy.array(opaque(image), dtype=numpy.uint8) for image in images]
    return from_bytes(torch.from_numpy(numpy.stack(arrays)).permute(0, 3, 1, 2).contiguous())


def opaque(image: "Image") -> "Image":
    """The image in RGB, composed over white; greyscale of more than 8 bits as `depth` reads it."""
    from PIL import Image

    image = depth.eight_bits(image)
    if image.mode == "RGB":
        return image
    if "A" not in image.getbands() and "a" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    width, height = image.size
    result = Image.new("RGB", image.size)
    # Some rows at a time: composing makes four copies.
    rows = max(1, 2**20 // max(1, width))
    for top in range(0, height, rows):
        part = image.crop((0, top, width, min(top + rows, height))).convert("RGBA")
        ground = Image.new("RGBA", part.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(ground, part).convert("RGB"), (0, top))
    return result


def grid(images: Tensor, columns: int | None = None, *, gap: int = 2) -> Tensor:
    """Contact sheet of images (batch, 3, height, width): (1, 3, ...), row by row on white; by default about square."""
    count, channels, height, width = images.shape
    columns = columns or int(numpy.ceil(numpy.sqrt(count)))
    rows = -(-count // columns)
    sheet = images.new_ones(1, channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for index in range(count):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[0, :, top : top + height, left : left + width] = images[index]
    return sheet
