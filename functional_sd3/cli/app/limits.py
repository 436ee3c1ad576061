"""Limits of what one visitor of the page may ask for; errors name the value, the limit and its flag."""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from functional_sd3.formats.printable import shorten

STEPS, COUNT, WAITING, UPLOAD, TEXT = 100, 4, 8, 32, 4096


class Limits(NamedTuple):
    """Most that a request may have."""

    side: int
    """Longest side of an image in pixels."""
    steps: int = STEPS
    count: int = COUNT  # type: ignore[assignment]  # hides tuple.count
    """Images of a request, of all its prompts."""
    waiting: int = WAITING
    """Requests that wait while one is drawn."""
    upload: int = UPLOAD
    """Size of an uploaded file, in MiB."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("limits of what a visitor may ask for").add_argument
    add("--max-size", type=int, metavar="PX", help="longest side of an image (default: twice the model's own, where "
        "its table of positions is as large)")  # fmt: skip
    add("--max-steps", type=int, default=STEPS, metavar="N", help=f"steps of a run (default {STEPS})")
    add("--max-count", type=int, default=COUNT, metavar="N", help=f"images of a request (default {COUNT})")
    add("--max-queue", type=int, default=WAITING, metavar="N",
        help=f"requests that wait while one is drawn (default {WAITING})")  # fmt: skip
    add("--max-upload", type=int, default=UPLOAD, metavar="MIB", help=f"size of an uploaded image (default {UPLOAD})")


def of(arguments: argparse.Namespace, own_side: int, largest: int) -> Limits:
    """The limits of the options for a model that draws images of `own_side` pixels, at most of `largest`."""
    side = min(2 * own_side, largest) if arguments.max_size is None else arguments.max_size
    return Limits(side, arguments.max_steps, arguments.max_count, arguments.max_queue, arguments.max_upload)


def check(limits: Limits, prompts: Sequence[str], count: int, steps: int, sides: dict[str, int]) -> None:
    """Raises ValueError for a request beyond the limits; sides: of its image, by name."""
    check_sides(limits, sides)
    check_number(f"steps {steps}", steps, limits.steps, "--max-steps", "steps")
    images = len(prompts) * count
    what = f"count {count}" if len(prompts) == 1 else f"{len(prompts)} prompts, one a line, with count {count}:"
    check_number(f"{what} {'' if images == count else f'{images} images'}".rstrip(), images, limits.count,
                 "--max-count", "images of a request")  # fmt: skip
    for prompt in prompts:
        if len(prompt) > TEXT:
            raise ValueError(f"the prompt {shorten(repr(prompt))} has {len(prompt):,} characters, above {TEXT:,}")


def check_sides(limits: Limits, sides: dict[str, int]) -> None:
    """Raises ValueError for a side of an image, by name, beyond the limit."""
    for name, side in sides.items():
        check_number(f"{name} {side}", side, limits.side, "--max-size", "pixels")


def check_number(what: str, value: int, limit: int, flag: str, unit: str) -> None:
    """Raises ValueError for a value above a limit, which a flag of `app` sets."""
    if value > limit:
        raise ValueError(f"{what} is above the limit of {limit:,} {unit} ({flag} {limit} of functional-sd3 app)")
