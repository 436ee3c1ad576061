"""Cuts of images to the size of a training sample: the largest part of its shape, resized, and mirrored if wanted."""

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image


class Cut(NamedTuple):
    """Cut of an image to a sample of `width` x `height` pixels.

    offset: in [0, 1], of the part along the side that is cut: 0 its left or upper end, 0.5 the middle, 1 the other end.
    mirrored: left and right exchanged.
    """

    width: int
    height: int
    offset: float = 0.5
    mirrored: bool = False


def box(width: int, height: int, cut: Cut) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in pixels of the largest part of an image that has the shape of the cut.

    One of the sides is the image's own; left and top are whole pixels.
    """
    if width * cut.height >= height * cut.width:
        part = (height * cut.width / cut.height, float(height))
    else:
        part = (float(width), width * cut.height / cut.width)
    left, top = (math.floor((whole - kept) * cut.offset) for whole, kept in zip((width, height), part, strict=True))
    return left, top, left + part[0], top + part[1]


def apply(image: "Image", cut: Cut) -> "Image":
    """The part `box` of an image, resized by Lanczos' filter: of `cut.width` x `cut.height` pixels."""
    from PIL import Image

    size = (cut.width, cut.height)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS, box=box(*image.size, cut))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if cut.mirrored else image
