"""Digests of weights and images, by which a resumed run sees whether they changed.

They depend on every byte and not on where it is stored. SHA-256 in as many threads as there are processors: about a
gigabyte a second and processor, so that 16 GB take seconds, less than the search for NaN of loading them.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Params
from functional_sd3.formats import bounded, files
from functional_sd3.formats.errors import WeightsError, reason
from functional_sd3.layouts import native

LENGTH = 32
"""Hexadecimal digits of a digest: 128 bits, enough to exclude accidental collisions."""
_BLOCK = 2**20


def params_digest(params: Params) -> str:
    """Digest of the paths, dtypes, shapes and values of a parameter tree."""
    leaves = tree.flatten_paths(params)
    names = sorted(leaves)
    with _pool() as pool:
        digests = list(pool.map(_leaf, [leaves[name] for name in names]))
    return combined(f"{name} {digest}" for name, digest in zip(names, digests, strict=True))


def model_digests(params: dict[str, Params]) -> dict[str, str]:
    """Digest of every component of a model, by the words that checkpoints keep it under.

    Of the values in the order of version 1 (`layouts.native`), as checkpoints of older versions have it.
    """
    ordered = native.in_version_1(params)
    return {f"the {name} of the model": params_digest(component) for name, component in ordered.items()}


def file_digests(paths: Iterable[Path]) -> list[str]:
    """Digests of the bytes of each file. Raises WeightsError, naming the file, when one cannot be read."""
    with _pool() as pool:
        return list(pool.map(_file, paths))


def combined(texts: Iterable[str]) -> str:
    """One digest of several texts, in their order; of any text, those with lone surrogates too."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()[:LENGTH]


def fingerprint(texts: Iterable[str]) -> str:
    """A short digest of several texts, as checkpoints keep it of names and captions."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def _leaf(leaf: Tensor) -> str:
    digest = hashlib.sha256(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
    if leaf.numel():
        digest.update(files.raw(leaf.detach().cpu()))
    return digest.hexdigest()


def _file(path: Path) -> str:
    digest = hashlib.sha256()
    with bounded.open_file(path) as file:
        try:
            while block := file.read(_BLOCK):
                digest.update(block)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read: {reason(error)}") from error
    return digest.hexdigest()


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1))
