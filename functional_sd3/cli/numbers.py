"""Ranges of the numeric options of every command, and numbers within other words: none is infinite or NaN."""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

from functional_sd3.formats.printable import shorten

_MAX_INT = 2**31 - 1


class OutOfRange(Exception):
    """A number that an option cannot have. No ValueError: argparse would replace its words."""


class Range(NamedTuple):
    """Values from `low` to `high`; `above`: `low` itself is none of them; `words`: the error for other values."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    words: str | None = None


SEED = Range(-(2**63), 2**63 - 1, words="must be from -2^63 to 2^63 - 1, the seeds that there are")
_COUNT = Range(1, _MAX_INT)
_SHARE = Range(0, 1)
_BELOW_ONE = Range(0, math.nextafter(1, 0), words="must be at least 0 and below 1")
_POSITIVE = Range(0, above=True)
RANGES = {
    "--accumulate": _COUNT,
    "--at-once": _COUNT,
    "--attention-steps": Range(0, _MAX_INT),
    "--atol": _POSITIVE,
    "--batch": _COUNT,
    "--batch-size": Range(1, 1_000_000),
    "--beta": _POSITIVE,
    "--block-swap": Range(0, _MAX_INT, words="must be a number of blocks, 0 or more"),
    "--bucket-min": _COUNT,
    "--cfg": Range(),
    "--count": Range(1, 1_000_000),
    "--crops": Range(1, _MAX_INT, words="must be at least 1, which is the middle"),
    "--density": Range(0, 1, above=True),
    "--depth": Range(0, _MAX_INT),
    "--draws": _COUNT,
    "--control-depth": _COUNT,
    "--dropout": _BELOW_ONE,
    "--ema": _BELOW_ONE,
    "--eps": _POSITIVE,
    "--equal": _SHARE,
    "--eta": _SHARE,
    "--fake-rate": _POSITIVE,
    "--fake-updates": _COUNT,
    "--features": _COUNT,
    "--fps": Range(0, 100, above=True),
    "--frames": Range(2, _MAX_INT),
    "--group": Range(2, _MAX_INT),
    "--image-steps": _COUNT,
    "--inner": Range(1, 1000),
    "--kl": Range(0),
    "--last": _COUNT,
    "--log-every": _COUNT,
    "--lora": Range(1, _MAX_INT, words="must be a rank of at least 1"),
    "--lr": Range(0, above=True, words="must be a positive number"),
    "--mask-outside": _SHARE,
    "--max-count": Range(1, 10_000),
    "--max-queue": _COUNT,
    "--max-size": _COUNT,
    "--max-steps": Range(1, 1_000_000),
    "--max-upload": Range(1, 2048),
    "--noise": _POSITIVE,
    "--overlap": Range(0, _MAX_INT),
    "--port": Range(0, 65_535),
    "--pictures": Range(1, 10_000_000),
    "--prior-images": _COUNT,
    "--prior-weight": _POSITIVE,
    "--probes": _COUNT,
    "--rank": _COUNT,
    "--rtol": _POSITIVE,
    "--result-every": Range(0, _MAX_INT),
    "--sample-every": Range(0, _MAX_INT),
    "--sampling-steps": Range(1, 1_000_000),
    "--save-every": _COUNT,
    "--seed": SEED,
    "--size": _COUNT,
    "--soften": Range(0, words="must be a number of pixels of at least 0"),
    "--source-cfg": Range(),
    "--steps": Range(1, 1_000_000),
    "--strength": _SHARE,
    "--subset-size": _COUNT,
    "--subsets": _COUNT,
    "--t": Range(),
    "--tangent-warmup": Range(0, _MAX_INT),
    "--teacher-steps": Range(1, 1_000_000),
    "--things": Range(1, 2),
    "--times": _COUNT,
    "--updates": _COUNT,
    "--validate-every": _COUNT,
    "--vectors": Range(1, 64),
    "--warmup": Range(0, _MAX_INT),
    "--window": Range(0, _MAX_INT),
    "--workers": Range(0, 1024, words="must be 0 (none besides this process) to 1,024"),
    "distill --shift": _POSITIVE,
    "distill --steps": Range(1, 10**12),
    "distill --to": Range(1, 1000),
    "merge --strength": Range(),
    "reward --steps": Range(1, 10**12),
    "quantize --steps": Range(0, 1_000_000),
    "train --block-swap": Range(1, _MAX_INT, words="must be at least 1 block; leave it out for none"),
    "train --shift": _POSITIVE,
    "train --steps": Range(1, 10**12),
}
"""Option -> its range; "COMMAND --option" for that command alone. A numeric option that is not named here is
limited to finite numbers, a whole one to 32 bits."""


def check_options(parser: argparse.ArgumentParser) -> None:
    """Give every option of `parser` whose type is int or float the range of its name in `RANGES`.

    Reading such an option raises argparse's error for words that are no number, OutOfRange for other values.
    """
    command = parser.prog.partition(" ")[2]
    for action in parser._actions:
        if action.type in (int, float) and action.option_strings:
            flag = action.option_strings[0]
            bounds = RANGES.get(f"{command} {flag}") or RANGES.get(flag) or _default_range(action.type)
            action.type = reader(action.type, flag, bounds)


def _default_range(kind: type) -> Range:
    return Range(-_MAX_INT, _MAX_INT) if kind is int else Range()


def reader(kind: type, flag: str, bounds: Range) -> Callable[[str], float]:
    """A function from words to a number of `kind` (int or float) within `bounds`, for argparse's `type`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{shorten(repr(text))} is not {what}") from None
        if problem := _problem(value, bounds):
            raise OutOfRange(f"{flag} {shorten(value)} {problem}")
        return value

    return read


def number(text: str, what: str) -> float:
    """The finite number that a part of a longer word is. Raises ValueError, naming `what`."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{what} {shorten(repr(text))} must be a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{what} {shorten(repr(text))} must be a finite number")
    return value


def seed(text: str | int, what: str) -> int:
    """The seed that a part of a longer word is: a whole number of 64 bits with a sign. Raises ValueError."""
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{what} {shorten(repr(text))} must be a whole number") from None
    if problem := _problem(value, SEED):
        raise ValueError(f"{what} {shorten(text)} {problem}")
    return value


def _problem(value: float, bounds: Range) -> str | None:
    """The problem of a value outside the bounds; None inside them."""
    low, high, above, words = bounds
    is_finite = isinstance(value, int) or math.isfinite(value)
    if is_finite and (low < value if above else low <= value) and value <= high:
        return None
    if words:
        return words
    if not is_finite:
        return "must be a finite number"
    least = f"above {low:g}" if above else f"at least {low:g}"
    if not value <= high and high > 1000:
        return f"must be at most {high:,}"
    if high > 1000:
        return f"must be {least}"
    return f"must be {least} and at most {high:,}" if above else f"must be between {low:g} and {high:,}"
