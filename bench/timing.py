"""Timing two ways of doing the same, fairly: one process, interleaved, warm, the same threads; ratios of medians."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """One comparison; seconds are medians, `spread` the middle half of ours over its median."""

    name: str
    ours: float
    theirs: float
    spread: float
    difference: float

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


def compare(
    name: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], *, rounds: int = 7, tolerance: float = 1e-4
) -> Row:
    """Times both, alternating which goes first. Raises ValueError when they differ by more than `tolerance`."""
    with torch.no_grad():
        mine, other = ours(), theirs()
        difference = float((mine - other).norm() / other.norm())
        if not difference <= tolerance:
            raise ValueError(f"{name}: the two sides differ by {difference:.2e}, more than {tolerance:.0e}")
        samples: dict[str, list[float]] = {"ours": [], "theirs": []}
        for index in range(rounds):
            order = (("ours", ours), ("theirs", theirs))
            for side, run in order if index % 2 else reversed(order):
                start = time.perf_counter()
                run()
                samples[side].append(time.perf_counter() - start)
    quarters = statistics.quantiles(samples["ours"], n=4)
    median = statistics.median(samples["ours"])
    return Row(name, median, statistics.median(samples["theirs"]), (quarters[2] - quarters[0]) / median, difference)


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| what | ours | theirs | ratio | spread | relative difference |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row.name} | {1e3 * row.ours:.1f} ms | {1e3 * row.theirs:.1f} ms | **{row.ratio:.2f}** "
            f"| {100 * row.spread:.0f} % | {row.difference:.0e} |"
        )
    return "\n".join(lines)
