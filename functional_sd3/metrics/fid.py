"""Frechet inception distance between statistics that carry their provenance, in memory and as .npz files.

Published numbers differ by the resize, the scaling, the weights and N more than by the models compared. So statistics
are stored with the name of the preprocessing, the fingerprint of the weights and the tap, and those that differ in one
of them are not compared.

Files have the entries `mu` (d,) and `sigma` (d, d), pytorch-fid's names of the mean and the covariance, which it reads
too, and `n`, `preprocessing`, `weights` and `tap`.
"""

import os
from typing import Any, NamedTuple

import numpy
import torch

from functional_sd3.formats import npz
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.printable import shorten
from functional_sd3.metrics import frechet, inception, npz_kind
from functional_sd3.metrics.frechet import Statistics


class Record(NamedTuple):
    """Statistics and their provenance: name of the preprocessing, `inception.fingerprint` of the weights, tap."""

    statistics: frechet.Statistics
    preprocessing: str
    weights: str
    tap: int = inception.TAPS[-1]


class Score(NamedTuple):
    """Frechet distance of `n` samples against `m` at a tap; as a string it names all four."""

    value: float
    n: int
    m: int
    tap: int = inception.TAPS[-1]

    def __str__(self) -> str:
        name = "FID" if self.tap == inception.TAPS[-1] else f"Frechet distance at tap {self.tap}"
        return f"{name} {self.value:.4f} (N = {self.n} and {self.m})"


def merge(a: Record, b: Record) -> Record:
    """The record of both sets together, as `frechet.merge`. Raises ValueError when their provenance differs."""
    check_alike(a, b)
    return a._replace(statistics=frechet.merge(a.statistics, b.statistics))


def score(a: Record, b: Record) -> Score:
    """`frechet.distance` of two records, with its warnings and errors. Raises ValueError when their provenance
    differs."""
    check_alike(a, b)
    return Score(frechet.distance(a.statistics, b.statistics), a.statistics.n, b.statistics.n, a.tap)


def check_alike(a: Record, b: Record) -> None:
    """Raises ValueError naming each part of the provenance in which two records differ."""
    differ = [
        f"{name} {ours!r} and {theirs!r}"
        for name, ours, theirs in zip(Record._fields[1:], a[1:], b[1:], strict=True)
        if ours != theirs
    ]
    if differ:
        raise ValueError(f"statistics made differently do not compare: {'; '.join(differ)}")


def save(path: str | os.PathLike, record: Record) -> None:
    """Write a record at `path`, atomically and without adding a suffix. Raises WeightsError when the system refuses."""
    n, mean, m2 = record.statistics
    entries = {"mu": mean.detach().cpu().numpy(), "sigma": (m2.detach() / max(n - 1, 1)).cpu().numpy(), "n": n}
    entries |= record._asdict()
    del entries["statistics"]
    npz.write(path, entries)


def load(
    path: str | os.PathLike,
    *,
    n: int | None = None,
    preprocessing: str | None = None,
    weights: str | None = None,
    tap: int | None = None,
) -> Record:
    """The record in a file that `save` or pytorch-fid wrote.

    n, preprocessing, weights, tap: for pytorch-fid's files, which lack them; a file that has them must agree. Raises
    WeightsError for a file that is missing or broken, and for provenance that neither the file nor the arguments have.
    """
    arguments = {"n": n, "preprocessing": preprocessing, "weights": weights, "tap": tap}
    entries = npz.read(path, "statistics", ("mu", "sigma", *arguments))
    if "mu" not in entries and "sigma" not in entries:
        raise WeightsError(f"{path}: holds {npz_kind.describe(path, 'statistics')}; statistics are mu and sigma")
    problems = [f"{name} is missing" for name in ("mu", "sigma") if name not in entries]
    labels: dict[str, Any] = {}
    for name, value in arguments.items():
        labels[name] = entries[name].item() if name in entries and entries[name].ndim == 0 else value
        if labels[name] is None:
            problems.append(f"does not say {name}; if you know it, pass {name}=...")
        elif value is not None and labels[name] != value:
            problems.append(f"says {name} {shorten(repr(labels[name]))}, not {value!r}")
    problems = problems or _misfits(entries, labels)
    if problems:
        raise WeightsError(f"{path}: {problem}" for problem in problems)
    count = labels.pop("n")
    mean, covariance = (torch.from_numpy(entries[name]).double() for name in ("mu", "sigma"))
    return Record(Statistics(count, mean, covariance * max(count - 1, 1)), **labels)


def _misfits(entries: dict[str, Any], labels: dict[str, Any]) -> list[str]:
    mean, covariance = entries["mu"], entries["sigma"]
    problems = []
    if mean.ndim != 1 or covariance.shape != (*mean.shape, *mean.shape):
        problems.append(f"mu {list(mean.shape)} and sigma {list(covariance.shape)} must be (d,) and (d, d)")
    problems += [f"{name} is {entries[name].dtype}" for name in ("mu", "sigma") if entries[name].dtype.kind != "f"]
    for name, kind in (("n", int), ("preprocessing", str), ("weights", str), ("tap", int)):
        if not isinstance(labels[name], kind):
            problems.append(f"{name} is {shorten(repr(labels[name]))}, not {kind.__name__}")
    if not problems and labels["n"] < 0:
        problems.append(f"n is {labels['n']}")
    if not problems:
        finite = {name: bool(numpy.isfinite(entries[name]).all()) for name in ("mu", "sigma")}
        problems += [f"{name} is not all finite: it holds NaN or infinities" for name in finite if not finite[name]]
    return problems
