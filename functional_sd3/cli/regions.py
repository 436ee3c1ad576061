"""Prompts for parts of an image, and images in tiles: `--region 0,0,512x1024="a red circle"`, `--tile 1024`."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from functional_sd3.cli import image_settings, inputs, numbers

if TYPE_CHECKING:
    from torch import Tensor

    from functional_sd3.pipeline import Region

_SIDE = "([0-9]{1,6})"
_BOX = re.compile(f"{_SIDE},{_SIDE},{_SIDE}[xX]{_SIDE}")
_FORM = "LEFT,TOP,WIDTHxHEIGHT=PROMPT or MASK.png=PROMPT, with @WEIGHT before the = if it is not 0.5"


class RegionSpec(NamedTuple):
    """One `--region`: a box (left, top, width, height) in pixels or the path of a mask, a weight and a prompt."""

    place: tuple[int, int, int, int] | str
    weight: float
    prompt: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--region",
        action="append",
        default=[],
        metavar="BOX[@WEIGHT]=PROMPT",
        help="a prompt for a part of the image: LEFT,TOP,WIDTHxHEIGHT=PROMPT in pixels, or MASK.png=PROMPT, where "
        "the mask is white (or, with transparency, as in --mask). Its weight against PROMPT is 0.5, where PROMPT "
        "describes the whole. May be repeated",
    )
    parser.add_argument(
        "--tile",
        metavar="PX[:OVERLAP]",
        help="draw in overlapping tiles of this side, so that an image may be larger than the model can see "
        "(overlap: a quarter)",
    )


def settings(arguments: argparse.Namespace) -> image_settings.Settings:
    """The options of regions and tiles, for the settings in an image."""
    return image_settings.given_options(arguments, ("region", "tile"))


def check(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """The side and overlap of tiles. Raises ValueError for words that make no sense, before anything is loaded."""
    for text in arguments.region:
        parse(text)
    return tile(arguments.tile)


def parse(text: str) -> RegionSpec:
    """Raises ValueError where the words are not of the form."""
    place, equals, prompt = text.partition("=")
    place, _, weight = place.partition("@")
    box = _BOX.fullmatch(place.strip())
    number = numbers.number(weight or "0.5", f"--region {text!r}: its weight")
    if not equals or not place or not number > 0:
        raise ValueError(f"--region {text!r} must be {_FORM}")
    if not box and not Path(place).is_file():
        raise ValueError(f"--region {text!r}: {place} is neither LEFT,TOP,WIDTHxHEIGHT nor the file of a mask")
    if not box:
        return RegionSpec(place, number, prompt)
    left, top, width, height = map(int, box.groups())
    return RegionSpec((left, top, width, height), number, prompt)


def tile(text: str | None) -> tuple[int, int] | None:
    """The side of a tile and its overlap, in pixels."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", text)
    if not match:
        raise ValueError(f"--tile {text!r} must be a side in pixels, or SIDE:OVERLAP")
    side, overlap = int(match[1]), int(match[2] or int(match[1]) // 4)
    if not overlap < side:
        raise ValueError(f"--tile {text}: the overlap must be below the side")
    return side, overlap


def prepare(arguments: argparse.Namespace, size: tuple[int, int]) -> "list[Region]":
    """The regions of the options; size (width, height) of what is drawn, in pixels.

    Raises ValueError for boxes that leave the image and masks of other proportions.
    """
    specs = [parse(text) for text in arguments.region]
    if not specs:
        return []
    from functional_sd3.pipeline import Region, masks

    regions = [Region(spec.prompt, _mask(spec, size), spec.weight) for spec in specs]
    for region in regions:
        masks.check(region.mask, size[1], size[0], 1)
    return regions


def _mask(spec: RegionSpec, size: tuple[int, int]) -> "Tensor":
    import torch

    from functional_sd3.image import pixels

    if isinstance(spec.place, str):
        return pixels.from_pil(inputs.read_mask(spec.place, least=4))[:, :1]
    left, top, wide, high = spec.place
    if left + wide > size[0] or top + high > size[1] or not wide * high:
        raise ValueError(f"the region {left},{top},{wide}x{high} is not in the image of {size[0]}x{size[1]}")
    mask = torch.zeros(1, 1, size[1], size[0], dtype=torch.float32, device="cpu")
    mask[..., top : top + high, left : left + wide] = 1
    return mask
