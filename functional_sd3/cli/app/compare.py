"""Two settings beside each other: the same prompt, noise and size, drawn by the options of each."""

from collections.abc import Callable
from typing import NamedTuple

from functional_sd3.cli.app import drawing, fields
from functional_sd3.cli.app.drawing import Drawn, Progress, Upload
from functional_sd3.cli.app.model import Served

SHARED = ("prompts", "negative", "key", "width", "height")
OWN = ("steps", "cfg", "method", "guidance", "cache", "loras")
"""Fields that each of the two has; the second's are `other_steps`, ..."""
OTHER = "other_"


class Compared(NamedTuple):
    """Both results, and the mean absolute difference of their pixels, in [0, 1]."""

    first: Drawn
    second: Drawn
    difference: float


def split(values: fields.Values) -> tuple[fields.Values, fields.Values]:
    """The values of either run."""
    shared = {name: values.get(name) for name in SHARED}
    first = {name: values.get(name) for name in OWN}
    second = {name: values.get(OTHER + name) for name in OWN}
    return {**shared, **first}, {**shared, **second}


def compare(served: Served, values: fields.Values, emit: Callable[[int, Progress | Drawn], None]) -> Compared:
    """The images of both; `emit` gets which of them (0 or 1) and its progress, at last its result."""
    results = []
    # Both are read before either is drawn: a mistake in the second costs nothing.
    parts = split(values)
    for part in parts:
        drawing.settings(served, part, {})
    for index, part in enumerate(parts):
        results.append(drawing.draw(served, part, Upload(), lambda state, index=index: emit(index, state)))  # type: ignore[misc]
        emit(index, results[-1])
    difference = (results[0].images - results[1].images).abs().mean().item()
    return Compared(results[0], results[1], difference)
