"""Diversity of drawn images: the spread of places and areas of things, against that of the world's images.

A model that is trained towards a reward may come to draw one safe image for a caption, which the reward does not show.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key
from functional_sd3.image import pixels
from functional_sd3.recipes.shapes import prompts, world

Groups = dict[tuple, list[float]]
"""Values by the properties of the captions that they depend on."""


class Spread(NamedTuple):
    """Spread of things in right images, and in as many images of the world with the same captions.

    images: the right ones. place: standard deviation of a coordinate of a thing's centre in pixels, within groups of
    the same relation, sizes and role in the caption; side: that of the square root of a thing's area, within groups of
    the same size and shape; `data_*`: the world's. distance: mean over groups of the Kolmogorov-Smirnov distance of
    the coordinates' distributions; data_distance: that between two draws of the world.
    """

    images: int
    place: float
    data_place: float
    side: float
    data_side: float
    distance: float
    data_distance: float


def measure(images: Tensor, scenes: Sequence[world.Scene], key: Key, *, reader: prompts.Reader) -> Spread:
    """The spread of those of `images` (batch, 3, 64, 64) in [0, 1] that are right; `key`: of the world's images.

    Raises ValueError where none is right.
    """
    readings = [reader(image) for image in images]
    right = [row for row, scene in enumerate(scenes) if prompts.judge(readings[row], scene).right]
    if not right:
        raise ValueError(f"none of {len(images)} images is right: there is no spread to measure")
    chosen = [scenes[row] for row in right]
    first, second = (
        [world.placed(one, scene) for one, scene in zip(prng.split(own, len(chosen)), chosen, strict=True)]
        for own in prng.split(key).unbind(-2)
    )
    placed = pixels.from_pil([world.draw(scene) for scene in first])
    seen = [_matched(scenes[row], readings[row]) for row in right]
    places, data, again = _places(seen), _places(first), _places(second)
    return Spread(
        images=len(right),
        place=_deviation(places),
        data_place=_deviation(data),
        side=_deviation(_sides(seen, images[torch.tensor(right, dtype=torch.int64, device=images.device)])),
        data_side=_deviation(_sides(first, placed)),
        distance=_distance(places, data),
        data_distance=_distance(again, data),
    )


def _matched(scene: world.Scene, reading: prompts.Reading) -> world.Scene:
    """The scene with its things at the places of the reading of a right image, matched by colour."""
    seen = {thing.colour: thing for thing in reading.things}
    return replace(scene, things=tuple(seen[thing.colour] for thing in scene.things))


def _places(scenes: Iterable[world.Scene]) -> Groups:
    groups: Groups = defaultdict(list)
    for scene in scenes:
        sizes = tuple(thing.size for thing in scene.things)
        for role, thing in enumerate(scene.things):
            groups[scene.relation, sizes, role, "x"].append(thing.x)
            groups[scene.relation, sizes, role, "y"].append(thing.y)
    return groups


def _sides(scenes: Iterable[world.Scene], images: Tensor) -> Groups:
    names = list(world.COLOURS)
    groups: Groups = defaultdict(list)
    for scene, image in zip(scenes, images, strict=True):
        nearest = prompts.nearest_colours(image)
        for thing in scene.things:
            area = int((nearest == names.index(thing.colour)).sum())
            groups[thing.size, thing.shape].append(math.sqrt(area))
    return groups


def _deviation(groups: Groups) -> float:
    """Standard deviation within the groups, pooled."""
    squares = sum(len(values) * float(numpy.var(values)) for values in groups.values())
    free = sum(len(values) - 1 for values in groups.values())
    return math.sqrt(squares / max(free, 1))


def _distance(ours: Groups, theirs: Groups) -> float:
    """Largest difference of two cumulative distributions, a mean over the groups weighted by their sizes."""
    total = 0.0
    for group, values in ours.items():
        both = numpy.sort(numpy.array([*values, *theirs[group]]))
        shares = (numpy.searchsorted(numpy.sort(one), both, side="right") / len(one) for one in (values, theirs[group]))
        one, other = shares
        total += len(values) * float(abs(one - other).max())
    return total / sum(map(len, ours.values()))
