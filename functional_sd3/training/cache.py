"""Caches of encoded training sets on disk: latents of images and conditioning of captions, encoded once.

A folder with

- `cache.json`: what the cache was made of, `Manifest`; written first, and never changed;
- `text-00000.safetensors`, ...: "context" and "pooled" of distinct captions, the empty one first, and in the metadata
  the captions themselves;
- `latents-00000.safetensors`, ...: of each image a tensor (views, channels, height, width) named by its number; of all
  of them "captions", the rows of their captions in the text, and "buckets", the numbers of their sizes.

Every shard has `Manifest.rows` rows, names its manifest by digest and is written whole or not at all, so that a cache
is made further after an interruption. Rows are mapped, and read by any number of processes; the checksum ("crc") of
each is compared when it is first read.
"""

import functools
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.formats import files, finite, json_fields
from functional_sd3.formats.errors import WeightsError, attempt
from functional_sd3.formats.files import Mapped
from functional_sd3.formats.header import Header
from functional_sd3.formats.printable import shorten
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training.cache_manifest import MANIFEST, Manifest, begin, is_cache, read_manifest
from functional_sd3.training.training_set import Latents, Text

__all__ = [
    "MANIFEST",
    "Cache",
    "Manifest",
    "begin",
    "is_cache",
    "latents",
    "missing",
    "open_cache",
    "read_manifest",
    "shard_path",
    "shards",
    "text",
    "texts",
    "write_latents",
    "write_text",
]
_OPEN = 64
"""Shards that are kept mapped: each holds a descriptor, of which a process may have 1024."""
_MOST_NAMED = 1000
"""Shards that are missing and named one by one."""
_AGAIN = "functional-sd3 cache with the options that made the cache writes what is missing"


class Cache(NamedTuple):
    """A complete cache. captions, buckets: of every image, the row of its caption and the number of its size."""

    folder: Path
    manifest: Manifest
    captions: Tensor
    buckets: Tensor


def shards(count: int, rows: int) -> list[range]:
    """The rows of each shard of `count` rows."""
    return [range(start, min(start + rows, count)) for start in range(0, count, rows)]


def shard_path(folder: str | os.PathLike, kind: str, number: int) -> Path:
    """The file of a shard. kind: "text" or "latents"."""
    return Path(folder) / f"{kind}-{number:05d}.safetensors"


def missing(folder: str | os.PathLike, manifest: Manifest, kind: str) -> list[int]:
    """Numbers of the shards that are still to be written: absent, damaged, or of another cache."""
    parts = shards(manifest.texts if kind == "text" else manifest.images, manifest.rows)
    problems: list[str] = []
    return [
        number
        for number, rows in enumerate(parts)
        if attempt(problems, _header, shard_path(folder, kind, number), manifest, kind, rows) is None
    ]


def write_text(
    folder: str | os.PathLike, manifest: Manifest, number: int, texts: Sequence[str], table: Conditioning
) -> None:
    """Write a shard of text. Raises WeightsError where the conditioning is not finite, or the disk refuses."""
    for name, part in table._asdict().items():
        _check_finite(part, f"the {name} of captions {number * manifest.rows} and following")
    checksums = [_checksum(context, pooled) for context, pooled in zip(*table, strict=True)]
    tensors = {**table._asdict(), "crc": _integers(checksums)}
    _write(folder, manifest, "text", number, tensors, {"captions": json.dumps(list(texts))})


def write_latents(
    folder: str | os.PathLike,
    manifest: Manifest,
    number: int,
    latents: Sequence[Tensor],
    captions: Tensor,
    buckets: Sequence[int],
    names: Sequence[str],
) -> None:
    """Write a shard of latents (views, channels, height, width) of each of its images."""
    for each, name in zip(latents, names, strict=True):
        _check_finite(each, f"the latents of {shorten(name, 200)}")
    first = number * manifest.rows
    tensors = {str(first + index): each for index, each in enumerate(latents)}
    numbers = torch.stack((captions, _integers(buckets)), dim=1)
    checksums = [_checksum(each, pair) for each, pair in zip(latents, numbers, strict=True)]
    tensors |= {"captions": captions, "buckets": numbers[:, 1].contiguous(), "crc": _integers(checksums)}
    _write(folder, manifest, "latents", number, tensors, {"names": json.dumps([shorten(each, 200) for each in names])})


def open_cache(folder: str | os.PathLike) -> Cache:
    """A cache, whose shards are all there; their values are read and compared with their checksums later.

    Raises WeightsError naming every shard that is missing, damaged or of another cache, and what writes it again.
    """
    manifest = read_manifest(folder)
    _check_count(folder, manifest)
    problems: list[str] = []
    captions, buckets = [], []
    for kind, count in (("text", manifest.texts), ("latents", manifest.images)):
        for number, rows in enumerate(shards(count, manifest.rows)):
            path = shard_path(folder, kind, number)
            if attempt(problems, _header, path, manifest, kind, rows) is not None and kind == "latents":
                mapped = files.open_mapped(path)
                captions.append(files.tensor(mapped, "captions").clone())
                buckets.append(files.tensor(mapped, "buckets").clone())
    if problems:
        raise WeightsError([*problems, f"{folder} is no complete cache: {_AGAIN}"])
    cache = Cache(Path(folder), manifest, torch.cat(captions), torch.cat(buckets))
    most = {"captions": max(manifest.texts, 1), "buckets": len(manifest.sizes)}
    for name, values in (("captions", cache.captions), ("buckets", cache.buckets)):
        if not 0 <= int(values.min()) <= int(values.max()) < most[name]:
            raise WeightsError(f"{folder}: the {name} of its images are not among the {most[name]} it has; {_AGAIN}")
    return cache


def _check_count(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Raises WeightsError where the folder has fewer files than the manifest has shards, before they are listed."""
    count = -(-manifest.images // manifest.rows) + -(-manifest.texts // manifest.rows)
    there = sum(name.endswith(".safetensors") for name in os.listdir(folder))
    if count > there + _MOST_NAMED:
        raise WeightsError(f"{folder}: has {there:,} of the {count:,} shards that {MANIFEST} says; {_AGAIN}")


def latents(cache: Cache, size: tuple[int, int] | None = None) -> Latents:
    """The latents of a cache. size: (height, width) of images drawn in between, by default the commonest."""
    row, views = _rows(cache, "latents"), cache.manifest.views

    def fetch(samples: Tensor) -> Tensor:
        return torch.stack([row(int(sample) // views)[0][int(sample) % views] for sample in samples])

    commonest = cache.manifest.sizes[int(cache.buckets.mode().values)]
    return Latents(fetch, tuple(cache.buckets.tolist()), size or commonest, views)


def text(cache: Cache) -> Text:
    """The conditioning of the captions of a cache."""
    row = _rows(cache, "text")

    def stacked(rows: Sequence[int]) -> dict[str, Tensor]:
        columns = zip(*(row(each) for each in rows), strict=True)
        return dict(zip(Conditioning._fields, map(torch.stack, columns), strict=True))

    return Text(lambda images: stacked(cache.captions[images].tolist()), stacked([0]), cache.manifest.t5_length)


def texts(cache: Cache) -> tuple[str, ...]:
    """The distinct captions of a cache, the empty one first: the rows of its text."""
    captions: list[str] = []
    for number, rows in enumerate(shards(cache.manifest.texts, cache.manifest.rows)):
        path = shard_path(cache.folder, "text", number)
        some = json_fields.parse(files.read_header(path).metadata.get("captions", "[]"), path)
        if not isinstance(some, list) or len(some) != len(rows) or not all(isinstance(each, str) for each in some):
            raise WeightsError(f"{path}: does not name the {len(rows)} captions that it is of; {_AGAIN}")
        captions += some
    return tuple(captions)


def _rows(cache: Cache, kind: str) -> Callable[[int], tuple[Tensor, ...]]:
    """number of a row -> its tensors, views of a mapped file; WeightsError where they are damaged."""
    manifest = cache.manifest
    verified = bytearray(manifest.texts if kind == "text" else manifest.images)

    @functools.lru_cache(maxsize=_OPEN)
    def mapped(number: int) -> Mapped:
        return files.open_mapped(shard_path(cache.folder, kind, number))

    def row(number: int) -> tuple[Tensor, ...]:
        shard, place = divmod(number, manifest.rows)
        file = mapped(shard)
        if kind == "text":
            tensors = tuple(files.tensor(file, name)[place] for name in Conditioning._fields)
        else:
            tensors = (files.tensor(file, str(number)),)
        if not verified[number]:
            numbers = [] if kind == "text" else [_integers((cache.captions[number], cache.buckets[number]))]
            if _checksum(*tensors, *numbers) != int(files.tensor(file, "crc")[place]):
                raise WeightsError(f"{file.path}: {_name(file, kind, place)} is damaged; delete the file: {_AGAIN}")
            verified[number] = 1
        return tensors

    return row


def _name(file: Mapped, kind: str, place: int) -> str:
    """Words for a row of a file."""
    key = "captions" if kind == "text" else "names"
    names = json_fields.parse(file.header.metadata.get(key, "[]"), file.path)
    return f"row {place} ({shorten(repr(names[place]), 80)})" if place < len(names) else f"row {place}"


def _header(path: Path, manifest: Manifest, kind: str, rows: range) -> Header:
    """The header of a shard. Raises WeightsError where it is not one of this cache with these rows."""
    if not path.exists():
        raise WeightsError(f"{path}: is missing")
    header = files.read_header(path)
    if header.metadata.get("contents") != manifest.contents:
        raise WeightsError(f"{path}: is of another cache")
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    count = len(rows)
    if kind == "text":
        wrong = [name for name in (*Conditioning._fields, "crc") if shapes.get(name, ())[:1] != (count,)]
    else:
        wrong = [name for name in ("captions", "buckets", "crc") if shapes.get(name) != (count,)]
        known = {(manifest.views, *size) for size in manifest.sizes}
        wrong += [str(row) for row in rows if (s := shapes.get(str(row), ())) and (s[0], *s[2:]) not in known or not s]
    if wrong:
        raise WeightsError(f"{path}: lacks {shorten(', '.join(wrong), 100)}, or has it in another shape")
    return header


def _write(
    folder: str | os.PathLike, manifest: Manifest, kind: str, number: int, tensors: Mapping[str, Tensor], notes: dict
) -> None:
    path = shard_path(folder, kind, number)
    files.write_atomic(path, tensors, metadata={**notes, "contents": manifest.contents})


def _check_finite(value: Tensor, where: str) -> None:
    if what := finite.nonfinite_kind(value):
        dtype = str(value.dtype).removeprefix("torch.")
        raise WeightsError(f"{where} hold {what} in {dtype}; another --text-dtype, such as bfloat16, may not")


def _checksum(*tensors: Tensor) -> int:
    value = 0
    for tensor in tensors:
        value = zlib.crc32(files.raw(tensor), value)
    return value


def _integers(values: Any) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device="cpu")
