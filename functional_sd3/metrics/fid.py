"""Frechet statistics that say how they were made, and scores that say of how many pictures.

Published numbers differ by the resize, the scaling, the weights and N more than by the models compared. So statistics
travel with what they were made of, and those made differently are not compared. `weights.save_statistics` writes them.
"""

from typing import NamedTuple

from functional_sd3.metrics import frechet, inception


class Record(NamedTuple):
    """Statistics and their making: the name of the preprocessing, `inception.fingerprint` of the weights, the tap."""

    statistics: frechet.Statistics
    preprocessing: str
    weights: str
    tap: int = inception.TAPS[-1]


class Score(NamedTuple):
    """A Frechet distance, of `n` samples against `m`, at a tap; its text says all of them."""

    value: float
    n: int
    m: int
    tap: int = inception.TAPS[-1]

    def __str__(self) -> str:
        name = "FID" if self.tap == inception.TAPS[-1] else f"Frechet distance at tap {self.tap}"
        return f"{name} {self.value:.4f} (N = {self.n} and {self.m})"


def merge(a: Record, b: Record) -> Record:
    """The record of both sets together, as `frechet.merge`. Raises ValueError when they were made differently."""
    check_alike(a, b)
    return a._replace(statistics=frechet.merge(a.statistics, b.statistics))


def score(a: Record, b: Record) -> Score:
    """`frechet.distance` of two records, with its warnings and errors. Raises ValueError when they were made
    differently: another preprocessing, other weights, another tap."""
    check_alike(a, b)
    return Score(frechet.distance(a.statistics, b.statistics), a.statistics.n, b.statistics.n, a.tap)


def check_alike(a: Record, b: Record) -> None:
    """Raises ValueError naming everything in which the making of two records differs."""
    differ = [
        f"{name} {ours!r} and {theirs!r}"
        for name, ours, theirs in zip(Record._fields[1:], a[1:], b[1:], strict=True)
        if ours != theirs
    ]
    if differ:
        raise ValueError(f"statistics made differently do not compare: {'; '.join(differ)}")
