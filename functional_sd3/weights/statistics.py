"""Frechet statistics on disk: an .npz file that says how it was made and that pytorch-fid reads too.

Entries: `mu` (d,) and `sigma` (d, d) as pytorch-fid names the mean and the covariance; `n`, `preprocessing`, `weights`
and `tap` as in `fid.Record`. Nothing in it is executed.
"""

import os
from typing import Any

import numpy
import torch

from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.printable import shorten
from functional_sd3.metrics.fid import Record
from functional_sd3.metrics.frechet import Statistics
from functional_sd3.weights import npz


def save_statistics(path: str | os.PathLike, record: Record) -> None:
    """Write a record at `path`, whole or not at all; the name is kept as it is. Raises WeightsError when the system
    refuses."""
    n, mean, m2 = record.statistics
    entries = {"mu": mean.detach().cpu().numpy(), "sigma": (m2.detach() / max(n - 1, 1)).cpu().numpy(), "n": n}
    entries |= record._asdict()
    del entries["statistics"]
    npz.write(path, entries)


def load_statistics(
    path: str | os.PathLike,
    *,
    n: int | None = None,
    preprocessing: str | None = None,
    weights: str | None = None,
    tap: int | None = None,
) -> Record:
    """The record in a file that `save_statistics` or pytorch-fid wrote.

    n, preprocessing, weights, tap: what pytorch-fid's files do not say, for those; a file that says it itself must
    agree. Raises WeightsError for a file that is missing or broken or does not say how it was made (and nobody else
    does), with what is missing.
    """
    given = {"n": n, "preprocessing": preprocessing, "weights": weights, "tap": tap}
    entries = npz.read(path, "statistics", ("mu", "sigma", *given))
    if "mu" not in entries and "sigma" not in entries:
        raise WeightsError(f"{path}: holds {npz.described(path, 'statistics')}; statistics are mu and sigma")
    problems = [f"{name} is missing" for name in ("mu", "sigma") if name not in entries]
    labels = {}
    for name, value in given.items():
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
