"""Features of images with their provenance, in memory and as .npz files."""

import os
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from functional_sd3.formats import npz
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.printable import shorten
from functional_sd3.metrics import npz_kind


class Features(NamedTuple):
    """Features (n, d) and their provenance, the fields of `fid.Record`; `fid.check_alike` compares both."""

    values: Tensor
    preprocessing: str
    weights: str
    tap: int


_PROVENANCE = {"preprocessing": str, "weights": str, "tap": int}


def save(path: str | os.PathLike, features: Features) -> None:
    """Write features as `features` (n, d) beside their provenance, atomically. Raises WeightsError when the system
    refuses."""
    labels = {name: getattr(features, name) for name in _PROVENANCE}
    npz.write(path, {"features": features.values.detach().cpu().numpy(), **labels})


def load(path: str | os.PathLike) -> Features:
    """Features that `save` wrote. Raises WeightsError for a file that is missing, broken or of another kind."""
    entries = npz.read(path, "features", ("features", *_PROVENANCE))
    if "features" not in entries:
        kind = npz_kind.describe(path, "features")
        raise WeightsError(f"{path}: holds {kind}; give the images, or a file that `evaluate kid --save` wrote")
    values = entries["features"]
    labels = {name: entries[name].item() for name in _PROVENANCE if name in entries and not entries[name].ndim}
    wrong = [name for name, kind in _PROVENANCE.items() if type(labels.get(name)) is not kind]
    problems = [f"{name} is {shorten(repr(labels.get(name)))}, not {_PROVENANCE[name].__name__}" for name in wrong]
    if values.ndim != 2 or values.dtype.kind != "f":
        problems.append(f"features are {values.dtype} {list(values.shape)}, not floating (n, d)")
    elif not numpy.isfinite(values).all():
        problems.append("features are not all finite: it holds NaN or infinities")
    if problems:
        raise WeightsError(f"{path}: {problem}" for problem in problems)
    return Features(torch.from_numpy(values), **labels)
