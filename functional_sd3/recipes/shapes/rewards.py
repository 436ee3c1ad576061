"""Rewards of the shapes world: the verdict of the reader of `prompts`, and a proxy that depends on colours alone.

The source of their prompts gives the scene of each caption as its fact.
"""

from collections.abc import Mapping, Sequence

import numpy
import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key
from functional_sd3.recipes.shapes import prompts, world
from functional_sd3.recipes.shapes.dataset import captions_of
from functional_sd3.training.rollouts import PromptSource


def source(things: int | None = None) -> PromptSource:
    """Captions of random scenes, held-out ones left out, and the scenes as their facts.

    things: 1 or 2 objects in all of them; by default two in seven of ten, as in the training of the shipped model.
    """
    two = {None: 0.7, 1: 0.0, 2: 1.0}[things]

    def draw(key: Key, count: int) -> tuple[list[str], list[world.Scene]]:
        scene_key, wording_key = prng.split(key).unbind(-2)
        scenes = world.scenes(scene_key, count, two=two)
        return list(captions_of(wording_key, scenes)), scenes

    return draw


def shapes(images: Tensor, captions: Sequence[str], scenes: Sequence[world.Scene]) -> Mapping[str, Tensor]:
    """ "right": 1 where the image matches its scene in all properties, else 0; "partial": the share of the six."""
    verdicts = prompts.verdicts(images, scenes)
    right = [float(verdict.right) for verdict in verdicts]
    partial = [sum(verdict) / len(verdict) for verdict in verdicts]
    return {"right": _scores(right), "partial": _scores(partial)}


def colours(images: Tensor, captions: Sequence[str], scenes: Sequence[world.Scene]) -> Mapping[str, Tensor]:
    """ "colours": 1 - the distance (total variation) of the image's shares of palette colours from an ideal drawing's.

    A proxy that depends on neither shapes nor places: a wrong image may have the highest score.
    """
    shares = [_colour_shares(image) for image in images]
    wanted = [_wanted_shares(scene) for scene in scenes]
    distances = [0.5 * float(numpy.abs(one - other).sum()) for one, other in zip(shares, wanted, strict=True)]
    return {"colours": _scores([1.0 - distance for distance in distances])}


def _colour_shares(image: Tensor) -> numpy.ndarray:
    """Share of the pixels nearest to each colour of the palette, (colours,)."""
    nearest = prompts.nearest_colours(image)
    return numpy.bincount(nearest.ravel(), minlength=len(world.COLOURS)) / nearest.size


def _wanted_shares(scene: world.Scene) -> numpy.ndarray:
    """Colour shares of a drawing of the scene, which hardly depend on the places of its things."""
    pixels = numpy.array(world.draw(scene), dtype=numpy.uint8)
    return _colour_shares(torch.from_numpy(pixels).permute(2, 0, 1))


def _scores(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")
