"""Inpainting masks, with and without transparency, as one channel: 255 is drawn anew, 0 is kept.

White is drawn anew and black is kept. Where alpha varies, alpha decides, by what its visible part shows:

- only white, or white beside black: the white strokes are drawn anew, all that is transparent is kept;
- one other colour: the strokes of that colour are drawn anew, all that is transparent is kept;
- anything else, black alone, or the image that the mask belongs to: what is transparent is drawn anew, as where a part
  of the image was erased.

Half transparent is half white. Where alpha is the same everywhere it does not count.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy

if TYPE_CHECKING:
    from PIL.Image import Image

_VARIES = 8
"""Least difference between the smallest and the largest alpha, of 255, for alpha to count."""
_NEAR = 32
"""Largest difference of two equal colours, of 255: lossy compression changes them."""
_SHARE = 0.98
"""Least share of the visible pixels that must have a colour: pixels at edges are mixed."""


class Mask(NamedTuple):
    """`image` in mode "L"; `reading`: words for the part that the rule of transparency draws anew, "" where it did not
    apply."""

    image: "Image"
    reading: str


def from_image(mask: "Image", image: "Image | None" = None) -> Mask:
    """The mask in an RGBA image by the rule above; `image`: the image that it masks.

    Raises ValueError where alpha is (nearly) 0 everywhere.
    """
    from PIL import Image

    alpha = mask.getchannel("A")
    least, most = _extrema(alpha)
    if most < _VARIES:
        raise ValueError(f"is transparent everywhere: its alpha is at most {most} of 255, where 255 is opaque")
    if most - least < _VARIES:
        return Mask(mask.convert("RGB").convert("L"), "")
    # Decided on at most a million pixels, resized without interpolation so that no colours are mixed.
    scale = min(1.0, (2**20 / (mask.width * mask.height)) ** 0.5)
    size = [max(1, round(side * scale)) for side in mask.size]
    values = numpy.asarray(mask.resize(size, Image.Resampling.NEAREST))
    if not (values[..., 3] >= most / 2).any():
        values = numpy.asarray(mask)
    visible = values[..., 3] >= most / 2
    colours = values[..., :3][visible].astype(numpy.int16)
    white = (colours >= 255 - _NEAR).all(1)
    black = (colours <= _NEAR).all(1)
    if white.mean() >= _SHARE:
        return Mask(alpha, "its white strokes are")
    is_image = image is not None and _shows(image, values, visible)
    if not is_image and white.any() and (white | black).mean() >= _SHARE:
        ground = Image.new("RGBA", mask.size, (0, 0, 0, 255))
        return Mask(Image.alpha_composite(ground, mask).convert("L"), "what is white in it is")
    near = (abs(colours - numpy.median(colours, axis=0)) <= _NEAR).all(1)
    if not is_image and near.mean() >= _SHARE and black.mean() < _SHARE:
        return Mask(alpha, "its strokes of one colour are")
    return Mask(alpha.point(range(255, -1, -1)), "what is transparent in it is")


def check_effect(mask: "Image", least: int) -> None:
    """Raises ValueError unless some value of a mask (mode "L") is at least `least`, as one below changes nothing."""
    most = _extrema(mask)[1]
    if most >= least:
        return
    if most == 0:
        raise ValueError("is black everywhere, so it changes nothing: what is white in a mask is drawn anew")
    ones = "; a mask of 0 and 1 must be multiplied by 255" if most == 1 else ""
    raise ValueError(f"has no value above {most}, where white is 255, so it changes nothing{ones}")


def _extrema(channel: "Image") -> tuple[int, int]:
    """Least and most value of an image in mode "L"."""
    levels = [level for level, count in enumerate(channel.histogram()) if count]
    return levels[0], levels[-1]


def _shows(image: "Image", values: numpy.ndarray, visible: numpy.ndarray) -> bool:
    """True if the visible pixels of a mask, RGBA values (height, width, 4), are those of the image."""
    from PIL import Image

    height, width = values.shape[:2]
    other = numpy.asarray(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)).astype(numpy.int16)
    return (abs(other[visible] - values[..., :3][visible]) <= _NEAR).all(1).mean() >= _SHARE
