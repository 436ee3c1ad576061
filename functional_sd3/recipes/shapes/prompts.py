"""Prompt following in the shapes world: images read back as scenes and compared with their captions.

Reading uses the pixels alone. The background is the commonest palette colour; all other pixels form connected regions,
each of which is named after the shape whose drawing overlaps it best. An image is right when
count, shapes, colours, sizes, background and relation all are.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.recipes.shapes import world

MIN_PIXELS = 20
"""Regions smaller than this (a small ring has 110, a small star 55) are ignored."""
MIN_OVERLAP = 0.6
"""Intersection over union below which a region is no shape at all."""


class Reading(NamedTuple):
    """Content of an image in the terms of `world`; things from the largest region to the smallest."""

    things: tuple[world.Thing, ...]
    background: str
    overlaps: tuple[float, ...]


Reader = Callable[[Tensor], Reading]
"""Reads an image (3, height, width) in [0, 1]."""


class Verdict(NamedTuple):
    """True for each property in which the image matches the scene; `right`: in all of them."""

    count: bool  # type: ignore[assignment]  # hides tuple.count
    shape: bool
    colour: bool
    size: bool
    background: bool
    relation: bool

    @property
    def right(self) -> bool:
        return all(self)


def read(image: Tensor) -> Reading:
    """The background and the things of an image (3, height, width), float in [0, 1] or uint8.

    Values beyond [0, 1] are clamped, NaN is grey, which is no colour of the palette, and other sizes are resized to
    64 x 64. Raises ValueError for a tensor of another shape or
    dtype, which is no image.
    """
    return _read(image, _stencils())


def _read(image: Tensor, stencils: "_Stencils") -> Reading:
    from scipy import ndimage

    names, palette = list(world.COLOURS), _palette()
    pixels = _pixels(image)
    nearest = _nearest(pixels, palette)
    ground = int(numpy.bincount(nearest.ravel(), minlength=len(names)).argmax())
    distance = numpy.sqrt(((pixels - palette[ground]) ** 2).sum(-1))
    # Pixels unlike the ground form regions. Colours at soft edges lie between two of the palette's, so a region takes
    # the colour of its inner pixels.
    regions, count = ndimage.label(distance > 40.0, structure=numpy.ones((3, 3)))
    named = []
    for index in range(1, count + 1):
        mask = regions == index
        if mask.sum() < MIN_PIXELS:
            continue
        named.append((mask.sum(), *_name(mask, pixels, palette[ground], palette, names, stencils)))
    named.sort(key=lambda entry: -entry[0])
    return Reading(tuple(entry[1] for entry in named), names[ground], tuple(entry[2] for entry in named))


def nearest_colours(image: Tensor) -> numpy.ndarray:
    """Index into `world.COLOURS` of the colour nearest to each pixel, (64, 64), of an image as `read` takes it."""
    return _nearest(_pixels(image), _palette())


def _palette() -> numpy.ndarray:
    return numpy.array(list(world.COLOURS.values()), dtype=numpy.float64)


def _nearest(pixels: numpy.ndarray, palette: numpy.ndarray) -> numpy.ndarray:
    return ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)


def _pixels(image: Tensor) -> numpy.ndarray:
    """(64, 64, 3) in [0, 255] of any image."""
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(f"image {list(image.shape)} must be (3, height, width), at least one pixel")
    if not image.is_floating_point() and image.dtype != torch.uint8:
        raise ValueError(f"image of dtype {image.dtype} must be floating, in [0, 1], or uint8")
    image = image.detach().cpu().float() / (255.0 if image.dtype == torch.uint8 else 1.0)
    image = image.nan_to_num(nan=0.5, posinf=1.0, neginf=0.0).clamp(0.0, 1.0)
    if tuple(image.shape[1:]) != (world.SIDE, world.SIDE):
        image = F.interpolate(image[None], (world.SIDE, world.SIDE), mode="bilinear", antialias=True)[0]
    return image.permute(1, 2, 0).numpy() * 255.0


def judge(reading: Reading, scene: world.Scene) -> Verdict:
    """Compare a reading with the scene of the caption."""
    wanted, read = scene.things, reading.things
    count = len(read) == len(wanted) and all(overlap >= MIN_OVERLAP for overlap in reading.overlaps)
    pairs = _pair_things(wanted, read)
    matched = len(pairs) == len(wanted)

    def same(attribute: str) -> bool:
        return matched and all(getattr(one, attribute) == getattr(other, attribute) for one, other in pairs)

    relation = scene.relation is None or (matched and _has_relation(pairs[0][1], pairs[1][1], scene.relation))
    return Verdict(count, same("shape"), same("colour"), same("size"), reading.background == scene.background, relation)


def readings(images: Tensor) -> list[Reading]:
    """`read` of each image of a batch (batch, 3, height, width)."""
    stencils = _stencils()
    return [_read(image, stencils) for image in images]


def verdicts(images: Tensor, scenes: Sequence[world.Scene], *, reader: Reader | None = None) -> list[Verdict]:
    """`judge` of each image of a batch (batch, 3, height, width) and its scene, to a reader, by default `read`."""
    read_images = readings(images) if reader is None else map(reader, images)
    return [judge(reading, scene) for reading, scene in zip(read_images, scenes, strict=True)]


def table(images: Tensor, scenes: Sequence[world.Scene], *, reader: Reader | None = None) -> dict[str, float]:
    """Share of images (batch, 3, height, width) that are right, in all and in each respect; reader: of `verdicts`."""
    judged = verdicts(images, scenes, reader=reader)
    shares = {name: float(numpy.mean([getattr(verdict, name) for verdict in judged])) for name in Verdict._fields}
    return {"right": float(numpy.mean([verdict.right for verdict in judged])), **shares}


def _pair_things(wanted, read) -> list[tuple[world.Thing, world.Thing]]:
    """Pairs of a wanted thing and one that was read, matched by colour: the colours of a scene's things differ."""
    if len(wanted) != len(read):
        return []
    if len(wanted) == 1:
        return [(wanted[0], read[0])]
    in_order = list(zip(wanted, read, strict=True))
    exchanged = list(zip(wanted, reversed(read), strict=True))
    return max(in_order, exchanged, key=lambda pairs: sum(one.colour == other.colour for one, other in pairs))


def _has_relation(first: world.Thing, second: world.Thing, relation: str) -> bool:
    across, down = world.RELATIONS[relation]
    dx, dy = first.x - second.x, first.y - second.y
    along = dx * across + dy * down
    return along > 0 and along >= abs(dy if across else dx)


def _name(mask, pixels, ground, palette, names, stencils) -> tuple[world.Thing, float]:
    """The thing whose drawing overlaps the region best, and that overlap (intersection over union)."""
    from scipy import ndimage

    offsets = pixels[mask] - ground
    # Along a soft edge the colour is mixed with the ground's; the pixels farthest from the ground's colour are purest.
    strength = numpy.linalg.norm(offsets, axis=1)
    pure = pixels[mask][strength >= numpy.quantile(strength, 0.6)].mean(0)
    colour = int(((palette - pure) ** 2).sum(1).argmin())
    towards = palette[colour] - ground
    # One pixel wider than a stencil: the middle of a region at the edge lies up to half a pixel outside the image.
    coverage = numpy.zeros((world.SIDE + 2 * (_MARGIN + 1),) * 2)
    dilated = ndimage.binary_dilation(mask, structure=numpy.ones((3, 3)))
    edge = _MARGIN + 1
    inner = coverage[edge:-edge, edge:-edge]
    inner[dilated] = numpy.clip((pixels[dilated] - ground) @ towards / max(float(towards @ towards), 1.0), 0.0, 1.0)
    rows, columns = numpy.nonzero(mask)
    middle_x, middle_y = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
    total, best = coverage.sum(), -1.0
    for x in numpy.arange(middle_x - 1, middle_x + 1.5, 0.5):
        for y in numpy.arange(middle_y - 1, middle_y + 1.5, 0.5):
            left, top = int(numpy.floor(x)), int(numpy.floor(y))
            window = coverage[top + 1 :, left + 1 :][: 2 * _MARGIN, : 2 * _MARGIN]
            stencil = stencils.coverage[int(2 * (x - left)), int(2 * (y - top))]
            shared = numpy.minimum(stencil, window).sum((1, 2))
            overlaps = shared / (stencils.areas[int(2 * (x - left)), int(2 * (y - top))] + total - shared)
            if overlaps.max() > best:
                best = float(overlaps.max())
                size, shape = stencils.kinds[int(overlaps.argmax())]
                thing = world.Thing(size, names[colour], shape, float(x), float(y))
    return thing, best


class _Stencils(NamedTuple):
    """Share of each pixel that every kind of thing covers, for centres at whole and half pixels."""

    kinds: list[tuple[str, str]]
    coverage: numpy.ndarray
    """(2, 2, kinds, 2 * margin, 2 * margin), indexed by twice the fractions of x and y."""
    areas: numpy.ndarray


_MARGIN = 16


def _stencils() -> _Stencils:
    kinds = [(size, shape) for size in world.RADII for shape in world.SHAPES]
    coverage = numpy.array(
        [[[_coverage(*kind, fx / 2, fy / 2) for kind in kinds] for fy in range(2)] for fx in range(2)]
    )
    return _Stencils(kinds, coverage, coverage.sum((-1, -2)))


def _coverage(size: str, shape: str, x: float, y: float) -> numpy.ndarray:
    middle = world.SIDE // 2
    scene = world.Scene((world.Thing(size, "white", shape, middle + x, middle + y),), "black")
    low, high = world.COLOURS["black"][0], world.COLOURS["white"][0]
    window = slice(middle - _MARGIN, middle + _MARGIN)
    return (numpy.asarray(world.draw(scene), dtype=numpy.float64)[window, window, 0] - low) / (high - low)
