"""Features of pictures on disk: an .npz file of `features` (n, d) and how they were made, as `collect.Features`."""

import os

import numpy
import torch

from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.printable import shorten
from functional_sd3.metrics.collect import Features
from functional_sd3.weights import npz

_KINDS = {"preprocessing": str, "weights": str, "tap": int}


def save_features(path: str | os.PathLike, found: Features) -> None:
    """Write features at `path`, whole or not at all. Raises WeightsError when the system refuses."""
    labels = {name: getattr(found, name) for name in _KINDS}
    npz.write(path, {"features": found.values.detach().cpu().numpy(), **labels})


def load_features(path: str | os.PathLike) -> Features:
    """The features that `save_features` wrote. Raises WeightsError for a file that is missing, broken or another."""
    entries = npz.read(path, "features", ("features", *_KINDS))
    if "features" not in entries:
        kind = npz.described(path, "features")
        raise WeightsError(f"{path}: holds {kind}; give the pictures, or a file that `evaluate kid --save` wrote")
    values = entries["features"]
    labels = {name: entries[name].item() for name in _KINDS if name in entries and not entries[name].ndim}
    wrong = [name for name, kind in _KINDS.items() if type(labels.get(name)) is not kind]
    problems = [f"{name} is {shorten(repr(labels.get(name)))}, not {_KINDS[name].__name__}" for name in wrong]
    if values.ndim != 2 or values.dtype.kind != "f":
        problems.append(f"features are {values.dtype} {list(values.shape)}, not floating (n, d)")
    elif not numpy.isfinite(values).all():
        problems.append("features are not all finite: it holds NaN or infinities")
    if problems:
        raise WeightsError(f"{path}: {problem}" for problem in problems)
    return Features(torch.from_numpy(values), **labels)
