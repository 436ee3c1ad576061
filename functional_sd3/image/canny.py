"""Canny edges of images, as ControlNets of kind "canny" read them.

Canny 1986, "A Computational Approach to Edge Detection"; the result of OpenCV's `Canny(image, low, high)` with its
defaults (aperture 3, the gradient's norm |dx| + |dy|), to the pixel.
"""

import math

import numpy
import torch
from torch import Tensor

from functional_sd3.core.checks import check_channels

LOW, HIGH = 100, 200
"""Thresholds that diffusers' examples of canny ControlNets use."""
_TAN_22 = round(math.tan(math.pi / 8) * 2**15)
"""tan(22.5 degrees) in fixed point, as OpenCV divides directions: 13573."""


def edges(images: Tensor, *, low: int = LOW, high: int = HIGH) -> Tensor:
    """Edges (batch, 1, height, width), uint8: 255 on them, 0 elsewhere.

    images: uint8 (batch, channels, height, width); of several channels the one with the steepest gradient counts at
    each pixel. A local maximum of the gradient's norm is an edge where it is above `high`, or above `low` and
    connected to such a one. Raises ValueError for another dtype or shape, and unless 0 <= low <= high.
    """
    if not 0 <= low <= high:
        raise ValueError(f"thresholds {low} and {high} must be 0 <= low <= high")
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}, must be uint8: pixels.to_bytes(images)")
    check_channels("images", images, images.shape[1] if images.ndim == 4 else 3)
    if not len(images):
        return images[:, :1]
    edge_maps = numpy.stack([_edges(image, low, high) for image in images.cpu().numpy()])
    return torch.from_numpy(edge_maps)[:, None].to(images.device)


def _edges(image: numpy.ndarray, low: int, high: int) -> numpy.ndarray:
    from scipy import ndimage

    dx, dy = _steepest(image)
    norm = abs(dx) + abs(dy)
    maxima = _is_maximum(dx, dy, norm)
    weak, strong = maxima & (norm > low), maxima & (norm > high)
    labels, count = ndimage.label(weak, numpy.ones((3, 3), bool))
    kept = numpy.zeros(count + 1, bool)
    kept[labels[strong]] = True
    kept[0] = False
    return numpy.where(kept[labels], 255, 0).astype(numpy.uint8)


def _steepest(image: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Sobel's derivatives (height, width) of the channel in which |dx| + |dy| is largest, the first of equal ones."""
    from scipy import ndimage

    values = image.astype(numpy.int32)
    smooth, difference = (1, 2, 1), (-1, 0, 1)
    parts = []
    for along, across in ((2, 1), (1, 2)):
        part = ndimage.correlate1d(values, difference, along, mode="nearest")
        parts.append(ndimage.correlate1d(part, smooth, across, mode="nearest"))
    chosen = (abs(parts[0]) + abs(parts[1])).argmax(0)[None]
    dx, dy = (numpy.take_along_axis(part, chosen, 0)[0] for part in parts)
    return dx, dy


def _is_maximum(dx: numpy.ndarray, dy: numpy.ndarray, norm: numpy.ndarray) -> numpy.ndarray:
    """True where the norm is a maximum along its direction, rounded to one of four; beyond the image it is 0."""
    padded = numpy.pad(norm, 1)
    height, width = norm.shape

    def beside(down: int, right: int) -> numpy.ndarray:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    x, y = abs(dx).astype(numpy.int64), abs(dy).astype(numpy.int64) << 15
    horizontal = y < x * _TAN_22
    vertical = y > x * _TAN_22 + (x << 16)
    # Of two equal neighbours one counts, along rows and columns; on diagonals neither.
    along_row = (norm > beside(0, -1)) & (norm >= beside(0, 1))
    along_column = (norm > beside(-1, 0)) & (norm >= beside(1, 0))
    falling = (norm > beside(-1, -1)) & (norm > beside(1, 1))
    rising = (norm > beside(-1, 1)) & (norm > beside(1, -1))
    diagonal = numpy.where((dx ^ dy) < 0, rising, falling)
    return numpy.where(horizontal, along_row, numpy.where(vertical, along_column, diagonal))
