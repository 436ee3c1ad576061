"""Runs of equal values in a sequence, such as the set of active ControlNets at each step."""

from collections.abc import Sequence
from typing import Any


def equal_runs(values: Sequence[Any]) -> list[tuple[int, int]]:
    """(first, stop) of each longest run of equal neighbours, in order; together they cover all of `values`."""
    starts = [index for index, value in enumerate(values) if index == 0 or value != values[index - 1]]
    return list(zip(starts, [*starts[1:], len(values)], strict=True)) if starts else []
