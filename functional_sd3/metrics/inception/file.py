"""The Inception weights of published scores: pytorch-fid's file, or its tensors as safetensors."""

import hashlib
import os
import warnings
from pathlib import Path

import torch

from functional_sd3.core.types import Params
from functional_sd3.formats import pickles, trees
from functional_sd3.formats.errors import WeightsError, reason
from functional_sd3.formats.files import Mapped
from functional_sd3.formats.sources import own_names
from functional_sd3.formats.tensors import open_tensors
from functional_sd3.formats.trees import TreePlan
from functional_sd3.metrics.inception import network

FILE = "pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of `FILE`, and of torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, which is the same."""

MAX_BYTES = 2**28
"""Bytes that are read of a pickled file, more than twice those of `FILE`."""
# Counter of training batches in newer files, which nothing depends on.
_COUNTER = ".num_batches_tracked"


class UnknownWeights(UserWarning):
    """The file's hash is not that of the weights that published scores were computed with."""


def load(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    strict: bool = False,
) -> Params:
    """Parameters for `inception.apply` from a `.pth` of tensors or a `.safetensors` file, of pytorch-fid's names.

    A file whose SHA-256 is not that of the published weights (no safetensors file's is) gives a warning,
    `UnknownWeights`; with `strict` an error. No code in the file is run. Raises WeightsError with every problem: a file
    that is missing or broken or holds something else, missing, unexpected or misshapen tensors.
    """
    path = Path(path)
    # Opened first, so that an unreadable file is reported as such and not by its hash.
    places = open_tensors(path) if path.suffix == ".safetensors" else _pickled(path)
    names = {name: name for name in places if not name.endswith(_COUNTER)}
    spec = network.spec()
    plan = trees.check(TreePlan(str(path), spec, own_names(spec), names, places, {}))
    _check_hash(path, strict)
    return trees.load(plan, dtype=dtype, device=device)


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hex. Raises WeightsError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {reason(error)}") from error


def _check_hash(path: Path, strict: bool) -> None:
    digest = sha256(path)
    if digest == SHA256:
        return
    message = f"{path}: SHA-256 {digest} is not that of {FILE} ({SHA256}); scores may not compare with published ones"
    if strict:
        raise WeightsError(message)
    warnings.warn(message, UnknownWeights, stacklevel=3)


def _pickled(path: Path) -> dict[str, Mapped]:
    try:
        mapped = pickles.open_pickle(path, MAX_BYTES)
    except WeightsError as error:
        raise WeightsError(f"{error}; a file of tensors such as {FILE} is needed here") from error
    return dict.fromkeys(mapped.header.tensors, mapped)
