"""A checkpoint on disk, one file or several with a manifest, as leaves that are read whole or piece by piece."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.formats import files, json_fields
from functional_sd3.formats.errors import WeightsError, attempt, reason
from functional_sd3.formats.files import Mapped
from functional_sd3.layouts import native
from functional_sd3.layouts.rules import swap_halves
from functional_sd3.parallel import pieces
from functional_sd3.parallel.pieces import Piece
from functional_sd3.training import digests, manifest
from functional_sd3.weights import metadata

IDENTITY = "checkpoint"
"""The name in a file's metadata of the checkpoint that it belongs to."""


class StoredLeaf(NamedTuple):
    """A leaf and the mapped files that have its pieces."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[tuple[Mapped, Piece], ...]


class Stored(NamedTuple):
    """An open checkpoint. files: of a manifest, () of a single file. swapped: leaves in the order of version 1."""

    path: Path
    leaves: dict[str, StoredLeaf]
    files: tuple[manifest.File, ...] = ()
    swapped: frozenset[str] = frozenset()


def settings(path: Path) -> dict[str, Any]:
    """The settings a checkpoint was saved with, {} where it has none. Raises WeightsError when they cannot be read."""
    if (path / manifest.NAME).exists():
        return manifest.read(path).settings
    text = files.read_header(path).metadata.get("settings", "{}")
    return dict(json_fields.parse_object(text, f"{path}: its settings").values)


def open_stored(path: Path) -> Stored:
    """The checkpoint, its files mapped and its headers read. Raises WeightsError, naming each file that is missing, cut
    short, of another checkpoint or at odds with the manifest."""
    if not (path / manifest.NAME).exists():
        mapped = files.open_mapped(path)
        version = metadata.version(mapped.header.metadata, str(path))
        leaves = {
            name: StoredLeaf(entry.dtype, entry.shape, ((mapped, Piece(entry.shape)),))
            for name, entry in mapped.header.tensors.items()
        }
        return Stored(path, leaves, (), _swapped(leaves, version))
    listed = manifest.read(path)
    problems: list[str] = []
    opened = [attempt(problems, _open, path, file, listed.identity) for file in listed.files]
    leaves = {}
    for name, leaf in listed.leaves.items():
        parts = []
        for number, piece in leaf.pieces:
            if (file := opened[number]) is not None:
                problems += _contradiction(file, name, leaf, piece)
                parts.append((file, piece))
        leaves[name] = StoredLeaf(leaf.dtype, leaf.shape, tuple(parts))
    if problems:
        raise WeightsError(problems)
    version = metadata.version({metadata.VERSION_KEY: str(listed.layout)}, str(path / manifest.NAME))
    return Stored(path, leaves, listed.files, _swapped(leaves, version))


def read(stored: Stored, name: str, wanted: Piece | None = None) -> Tensor:
    """A copy of a piece of a leaf, None for the whole, of which the files' other pages are not read. Raises
    WeightsError where the files do not have all of it."""
    leaf = stored.leaves[name]
    wanted = Piece(leaf.shape) if wanted is None else wanted
    needed = Piece(leaf.shape) if name in stored.swapped else wanted
    try:
        value = pieces.assemble(needed, ((files.tensor(mapped, name), piece) for mapped, piece in leaf.parts))
    except ValueError as error:
        raise WeightsError(f"{stored.path}: {name} {error}") from error
    # Halves of what has the order of version 1 are swapped in the whole leaf.
    return pieces.cut(swap_halves(value), wanted) if name in stored.swapped else value


def check_digests(stored: Stored, index: int = 0, count: int = 1) -> None:
    """Raises WeightsError, naming each, where files `index`, `index + count`, ... are not what was written."""
    own = stored.files[index::count]
    actual = digests.file_digests([stored.path / file.name for file in own])
    if changed := [file.name for file, digest in zip(own, actual, strict=True) if digest != file.digest]:
        raise WeightsError(
            [f"{stored.path / name}: is not what was written: its digest is another" for name in changed]
        )


def _open(folder: Path, file: manifest.File, identity: str) -> Mapped:
    path = folder / file.name
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise WeightsError(f"{path}: is missing, and {manifest.NAME} names it") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be opened: {reason(error)}") from error
    if size != file.size:
        raise WeightsError(f"{path}: has {size} bytes, not the {file.size} that were written")
    mapped = files.open_mapped(path)
    if mapped.header.metadata.get(IDENTITY) != identity:
        raise WeightsError(f"{path}: belongs to another checkpoint than {manifest.NAME} beside it")
    return mapped


def _contradiction(mapped: Mapped, name: str, leaf: manifest.Leaf, piece: Piece) -> list[str]:
    entry = mapped.header.tensors.get(name)
    if entry is not None and (entry.dtype, entry.shape) == (leaf.dtype, piece.local_shape):
        return []
    held = "nothing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
    return [f"{mapped.path}: has {held} of {name}, and {manifest.NAME} says {leaf.dtype} {list(piece.local_shape)}"]


def _swapped(leaves: dict[str, StoredLeaf], version: int) -> frozenset[str]:
    return frozenset(native.swapped_in_version_1(leaves)) if version == 1 else frozenset()
