"""Aspect-ratio buckets: the sizes that images of a set are cut to, so that little of each is lost.

Podell et al. 2023, arXiv:2307.01952 (SDXL), section 2.3 and appendix I: sizes of about one area in steps of 64 pixels.
Several areas train several resolutions at once, as SD3.5-medium was up to 1440 x 1440 (its model card).
All of this is a function of the images' sizes and the options.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class Options:
    """Sizes that buckets may have.

    areas: squares' sides in pixels, one for each area; no size has more pixels than its area. step: sides are multiples
    of it. ratio: the longest side over the shortest is at most this. least: images that a bucket must have, those of
    smaller ones go to the nearest.
    """

    areas: tuple[int, ...]
    step: int = 64
    ratio: float = 2.0
    least: int = 1


class Buckets(NamedTuple):
    """The sizes in use, in ascending order, and for each image the number of its own."""

    sizes: tuple[Size, ...]
    of_image: tuple[int, ...]


def check(options: Options, multiple: int, longest: int) -> None:
    """Raises ValueError, naming the option, for sizes that a model does not take.

    multiple: of which its sides must be multiples, the factor of the autoencoder times the patch size. longest: side
    that it has positions for.
    """
    if options.step < 1 or options.step % multiple:
        raise ValueError(
            f"--bucket-step {options.step} must be a multiple of {multiple}, the side in pixels of a patch of the model"
        )
    if not 1 <= options.ratio < math.inf:
        raise ValueError(f"--bucket-ratio {options.ratio} must be at least 1, which is squares alone")
    for area in options.areas:
        if not options.step <= area <= longest:
            raise ValueError(
                f"--buckets {area} must be a side from --bucket-step {options.step} to the {longest} pixels that the "
                "model has positions for"
            )


def sizes(area: int, options: Options, longest: int) -> list[Size]:
    """All sizes of one area: for every width the greatest height, and the other way round, with no side above
    `longest`."""
    step, pixels = options.step, area * area
    pairs = set()
    for one in range(step, longest + 1, step):
        other = min(pixels // (one * step) * step, longest // step * step)
        if other and max(one, other) <= options.ratio * min(one, other):
            pairs |= {(one, other), (other, one)}
    side = area // step * step
    return sorted(pairs | {(side, side)})


def assign(images: Sequence[Size], options: Options, longest: int) -> Buckets:
    """The bucket of every image: of the largest area that it fills without being enlarged (else of the smallest one)
    the size of the nearest aspect ratio.

    Images of buckets with fewer than `options.least` go to the nearest of the others, smallest bucket first; one bucket
    is left at least, whatever its number of images.
    """
    areas = {area: sizes(area, options, longest) for area in sorted(set(options.areas))}
    chosen = [_largest_filled(image, list(areas.values())) for image in images]
    while True:
        counts = Counter(chosen)
        small = min(counts, key=lambda size: (counts[size], size))
        if counts[small] >= options.least or len(counts) == 1:
            break
        others = sorted(counts.keys() - {small})
        chosen = [
            _nearest(image, others, size) if size == small else size for image, size in zip(images, chosen, strict=True)
        ]
    used = sorted(set(chosen))
    number = {size: index for index, size in enumerate(used)}
    return Buckets(tuple(used), tuple(number[size] for size in chosen))


def enlarged(images: Sequence[Size], buckets: Buckets) -> list[int]:
    """The images, by their numbers, that are narrower or lower than their bucket, and so are enlarged."""
    sizes = [buckets.sizes[number] for number in buckets.of_image]
    return [row for row, (image, size) in enumerate(zip(images, sizes, strict=True))
            if image[0] < size[0] or image[1] < size[1]]  # fmt: skip


def _largest_filled(image: Size, areas: list[list[Size]]) -> Size:
    nearest = [_nearest(image, area, None) for area in areas]
    filled = [size for size in nearest if size[0] <= image[0] and size[1] <= image[1]]
    return filled[-1] if filled else nearest[0]


def _nearest(image: Size, candidates: Sequence[Size], before: Size | None) -> Size:
    """The size with the nearest aspect ratio; of equal ones that of the area nearest to `before`, or the largest."""

    def distance(size: Size) -> tuple[float, float, Size]:
        ratio = abs(math.log(image[0] * size[1] / (image[1] * size[0])))
        pixels = size[0] * size[1]
        return ratio, -pixels if before is None else abs(math.log(pixels / (before[0] * before[1]))), size

    return min(candidates, key=distance)
