"""Greyscale of more than 8 bits (Pillow's modes I, I;16 and F), which Pillow itself clips to 255 when it converts it.

Integers span 0 (black) to 65535 (white), or as many bits as a TIFF declares; floats 0 to 1. Values outside are refused.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from PIL.Image import Image

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339


class RefusedError(ValueError):
    """An image that could be decoded, but is beyond the bounds; its message is this program's, not a decoder's."""


def is_deep(image: "Image") -> bool:
    """True for greyscale of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def eight_bits(image: "Image") -> "Image":
    """Greyscale of more bits rounded to 8 (modes "L" and "LA"), any other image as it is. Raises ValueError."""
    if not is_deep(image):
        return image
    grey = _by_rows(image, "L", _unit(image, numpy.uint8, 255.0))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        # PNG declares one of the 65536 greys transparent.
        alpha = lambda values: numpy.where(values == transparent, 0, 255).astype(numpy.uint8)  # noqa: E731
        grey.putalpha(_by_rows(image, "L", alpha))
    return grey


def floats(image: "Image") -> "Image":
    """Greyscale of more bits as floats in [0, 1] (mode "F"). Raises ValueError."""
    return _by_rows(image, "F", _unit(image, numpy.float32, 1.0))


def _unit(image: "Image", dtype: type, white: float) -> Callable[[numpy.ndarray], numpy.ndarray]:
    """Function of a deep image's values that scales full scale to `white`. Raises ValueError for values beyond it."""
    scale = 1.0 if image.mode == "F" else _full_scale(image)
    extrema = [(part.min(), part.max()) for _, part in _rows(image)]
    low, high = min(low for low, _ in extrema), max(high for _, high in extrema)
    # Rounding may take floats slightly beyond the range.
    if not (low >= -1e-5 and high <= scale * (1 + 1e-5)):
        kind = "floats" if image.mode == "F" else "integers of more than 8 bits"
        raise RefusedError(
            f"holds values from {low:g} to {high:g}: {kind} are read as 0 (black) to {scale:g} (white); "
            "scale them to that"
        )
    inverted = image.mode != "F" and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0

    def convert(values: numpy.ndarray) -> numpy.ndarray:
        values = values.astype(numpy.float32)
        values = (scale - values if inverted else values).clip(0, scale) * numpy.float32(white / scale)
        return values.round().astype(dtype) if dtype is numpy.uint8 else values

    return convert


def _full_scale(image: "Image") -> float:
    """White of integers of more than 8 bits: 65535, unless a TIFF declares fewer bits or a sign."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (16,))[0]
    if bits == 16 and tags.get(_SAMPLE_FORMAT, (1,))[0] == 2:
        return 32767.0
    return 2.0 ** min(bits, 16) - 1


def _by_rows(image: "Image", mode: str, function: Callable[[numpy.ndarray], numpy.ndarray]) -> "Image":
    """An image of `mode` from `function` of the values, some rows at a time: little memory beyond the result's."""
    from PIL import Image

    result = Image.new(mode, image.size)
    for top, part in _rows(image):
        result.paste(Image.fromarray(function(part)), (0, top))
    return result


def _rows(image: "Image") -> Iterator[tuple[int, numpy.ndarray]]:
    """Index of the first row and values, of some rows at a time."""
    width, height = image.size
    rows = max(1, 2**20 // width)
    for top in range(0, height, rows):
        yield top, numpy.asarray(image.crop((0, top, width, min(top + rows, height))))
