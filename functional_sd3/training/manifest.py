"""Manifest of a checkpoint in several files: what it holds and in which of them, as JSON.

It is written last, so that a folder without one is no checkpoint, and holds the size and digest of every file, of every
leaf its dtype, its shape and which piece of it (`parallel.pieces`) is in which file.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from functional_sd3.formats import files, json_fields
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.header import DTYPES
from functional_sd3.formats.json_fields import Object
from functional_sd3.formats.printable import shorten
from functional_sd3.parallel.pieces import Piece

NAME = "manifest.json"
VERSION = 1
_LIMIT = 2**28
_MAX_SIDE = 2**63 - 1


class File(NamedTuple):
    """A file of the checkpoint: its name, size in bytes and SHA-256."""

    name: str
    size: int
    digest: str


class Leaf(NamedTuple):
    """A leaf of the state; pieces: (index of the file that holds it, piece)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, Piece], ...]


class Manifest(NamedTuple):
    """identity: a random text that every file of the checkpoint has in its metadata. layout: version of the order of
    values (`layouts.native`). mesh: that it was written on. settings: of the run."""

    identity: str
    step: int
    layout: int
    mesh: str
    settings: dict[str, Any]
    files: tuple[File, ...]
    leaves: dict[str, Leaf]


def dump(manifest: Manifest) -> bytes:
    """The content of the file."""
    content = {
        "version": VERSION,
        "identity": manifest.identity,
        "step": manifest.step,
        "layout": manifest.layout,
        "mesh": manifest.mesh,
        "settings": manifest.settings,
        "files": [{"name": name, "bytes": size, "sha256": digest} for name, size, digest in manifest.files],
        "leaves": {
            name: {
                "dtype": files.CODES[leaf.dtype],
                "shape": leaf.shape,
                "pieces": [{"file": file, "ranges": {str(dim): own for dim, own in piece.ranges}}
                           for file, piece in leaf.pieces],
            }
            for name, leaf in manifest.leaves.items()
        },
    }  # fmt: skip
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def read(folder: Path) -> Manifest:
    """The manifest of a folder. Raises WeightsError, naming what is wrong, where it cannot be read or is none."""
    fields = json_fields.read(folder / NAME, limit=_LIMIT)
    version = fields.integer("version", low=1)
    if version > VERSION:
        raise fields.error("version", f"is later than {VERSION}, the newest that this program reads")
    listed = tuple(_file(entry) for entry in fields.mappings("files", most=2**16))
    leaves = fields.mapping("leaves")
    return Manifest(
        fields.text("identity", longest=100),
        fields.integer("step", low=0),
        fields.integer("layout", low=1),
        fields.text("mesh", longest=1000),
        dict(fields.mapping("settings").values),
        listed,
        {name: _leaf(leaves.mapping(name), len(listed)) for name in leaves.values},
    )


def _file(entry: Object) -> File:
    name = entry.text("name", longest=255)
    if name in (".", "..", NAME) or not name.isascii() or set(name) & set("/\\\0"):
        raise entry.error("name", "must be the name of a file beside the manifest")
    return File(name, entry.integer("bytes", low=0), entry.text("sha256", longest=64))


def _leaf(entry: Object, count: int) -> Leaf:
    code = entry.text("dtype", longest=20)
    if code not in DTYPES:
        raise entry.error("dtype", f"must be one of {', '.join(DTYPES)}")
    shape = tuple(entry.items("shape", kind=int, most=64))
    if any(not 0 <= side <= _MAX_SIDE for side in shape) or math.prod(shape) > _MAX_SIDE:
        raise entry.error("shape", "must be a list of sizes")
    parts = []
    for part in entry.mappings("pieces", most=2**16):
        file = part.integer("file", low=0, high=max(count - 1, 0))
        ranges = part.mapping("ranges").values
        parts.append((file, Piece(shape, tuple(sorted(_ranges(part, shape, ranges))))))
    return Leaf(DTYPES[code], shape, tuple(parts))


def _ranges(part: Object, shape: tuple[int, ...], ranges: Mapping[str, Any]) -> Any:
    for text, values in ranges.items():
        dim = int(text) if text.isdecimal() and len(text) < 3 else -1
        valid = 0 <= dim < len(shape) and isinstance(values, list)
        if not valid or not all(_is_range(value, shape[dim]) for value in values):
            raise WeightsError(
                f"{part.where}: ranges {shorten(repr(ranges))} are none of a leaf of shape {list(shape)}"
            )
        yield dim, tuple((start, stop) for start, stop in values)


def _is_range(value: Any, size: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(end) is int for end in value)
        and 0 <= value[0] < value[1] <= size
    )
