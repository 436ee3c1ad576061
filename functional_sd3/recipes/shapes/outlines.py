"""A second reader of images of the shapes world, which shares nothing with that of `prompts` but the palette.

`prompts.read` compares a region with drawings and takes the best, so a star whose points are rounded off is still
nearest to a star. This one looks at the outline alone: holes, the share of its convex hull that a region fills
(solidity) and the share of its bounding box. A star without points fills its hull and is no star here, so this reader
measures how faithfully an autoencoder draws corners, and judges models that were rewarded by the other.
"""

import numpy
import torch
from torch import Tensor

from functional_sd3.recipes.shapes import world
from functional_sd3.recipes.shapes.prompts import Reading

MIN_PIXELS = 10
MIN_HOLE = 0.3
"""Area of a hole over that of the region: 0.59 to 0.67 for rings, 0 for all others."""
STAR, CROSS = 0.71, 0.87
"""Largest solidities: that of stars is 0.59 to 0.69, of crosses 0.73 to 0.78, of convex shapes 0.95 to 1."""
TRIANGLE, CIRCLE = 0.67, 0.89
"""Largest shares of the bounding box: that of triangles is 0.52 to 0.56, of circles 0.78, of squares 0.99 to 1."""
LARGE = 18.5
"""Least side of the bounding box in pixels, the square root of its area: 11 to 14 for small shapes, 23 to 26 for large
ones."""
_FINER = 4
"""Outlines are traced on a grid this many times finer, between whose points the coverage is interpolated."""


def read(image: Tensor) -> Reading:
    """The background and the things of an image (3, 64, 64) in [0, 1], from the largest to the smallest.

    A region too faint to have an outline is a thing of no size and shape (""). `overlaps`, which this reader does not
    measure, are 1, so that `prompts.judge` takes the reading as one of its own.
    """
    from scipy import ndimage

    names = list(world.COLOURS)
    palette = numpy.array([world.COLOURS[name] for name in names], dtype=numpy.float64)
    pixels = image.detach().cpu().to(torch.float64).clamp(0, 1).permute(1, 2, 0).numpy() * 255
    rim = numpy.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = int(((palette - numpy.median(rim, axis=0)) ** 2).sum(1).argmin())
    distance = numpy.linalg.norm(pixels - palette[ground], axis=-1)
    labels, count = ndimage.label(distance > 45)
    things = []
    for index in range(1, count + 1):
        mask = labels == index
        if (area := int(mask.sum())) >= MIN_PIXELS:
            things.append((area, _thing(mask, pixels, distance, palette, names, ground)))
    things.sort(key=lambda each: -each[0])
    return Reading(tuple(thing for _, thing in things), names[ground], (1.0,) * len(things))


def _thing(mask, pixels, distance, palette, names, ground) -> world.Thing:
    from scipy import ndimage

    # Pixels at the outline are mixed with the ground, so the half farther from its colour votes.
    far = pixels[mask & (distance >= numpy.median(distance[mask]))]
    nearest = ((far[:, None] - palette) ** 2).sum(-1).argmin(-1)
    votes = numpy.bincount(nearest, minlength=len(names))
    votes[ground] = 0
    colour = int(votes.argmax())
    axis = palette[colour] - palette[ground]
    coverage = numpy.clip((pixels - palette[ground]) @ axis / max(float(axis @ axis), 1.0), 0, 1)
    coverage = numpy.where(ndimage.binary_dilation(mask, iterations=2), coverage, 0)
    padded = numpy.pad(coverage, 1)
    inside = ndimage.zoom(padded, _FINER, order=1, mode="nearest", grid_mode=True) > 0.5
    rows, columns = numpy.nonzero(inside)
    if not len(rows):
        return world.Thing("", names[colour], "")
    size, shape = _kind(inside, rows, columns)
    x, y = ((values.min() + values.max() + 1) / (2 * _FINER) - 1 for values in (columns, rows))
    return world.Thing(size, names[colour], shape, float(x), float(y))


def _kind(inside, rows, columns) -> tuple[str, str]:
    from scipy import ndimage
    from scipy.spatial import ConvexHull

    area = len(rows)
    box = (numpy.ptp(rows) + 1) * (numpy.ptp(columns) + 1)
    filled = ndimage.binary_fill_holes(inside).sum()
    corners = numpy.concatenate([numpy.stack([columns + x, rows + y], 1) for x in (0, 1) for y in (0, 1)])
    solidity = filled / ConvexHull(corners).volume
    size = "large" if box**0.5 / _FINER >= LARGE else "small"
    if filled - area > MIN_HOLE * area:
        return size, "ring"
    if solidity < CROSS:
        return size, "star" if solidity < STAR else "cross"
    share = area / box
    return size, "triangle" if share < TRIANGLE else "circle" if share < CIRCLE else "square"
