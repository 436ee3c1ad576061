"""Headers of safetensors files: a JSON table of names, dtypes, shapes and places, believed only after it was checked.

Refused is whatever the safetensors library refuses (bytes that overlap, leave gaps or do not fit the shape, tables that
are not about the whole file) and names that occur twice. Nothing is allocated that the file does not hold.
"""

import math
import os
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import torch

from functional_sd3.formats import json_fields, magic
from functional_sd3.formats.errors import WeightsError, reason

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of the format, except complex ones, which no file here has."""
_MAX_HEADER = 2**25
MAX_TENSORS = 2**15
"""Ten times as many as the largest model with all its encoders and a LoRA have; looking at names takes time."""
_START = 32
_OFFSETS = b'"data_offsets"'
_MAX_DIMENSIONS = 64


class Entry(NamedTuple):
    """One tensor of a file: `start` and `end` are places in the file.

    blocks: the kind of blocks (`formats.blocks`) its bytes are, of which `dtype` is what they become; None where they
    are the values themselves.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    blocks: str | None = None


class Header(NamedTuple):
    """Tensors and metadata of a file. drops_ones: its shapes may lack leading dimensions of 1, as ggml's do."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    drops_ones: bool = False


def read(path: str | os.PathLike, file: BinaryIO) -> Header:
    """The checked header of an open file. Raises WeightsError, naming `path`, when it is not valid in every respect."""
    try:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_START)
        length = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{" and (kind := magic.foreign_kind(start)):
            raise ValueError(kind)
        if start[8:9] != b"{" and file.seek(257) and file.read(5) == b"ustar":
            raise ValueError("is an archive, not weights: unpack it, and give what is in it")
        if size < 8:
            raise ValueError(f"{size} bytes are too few for a safetensors file: truncated, or something else")
        if start[8:9] != b"{" and _is_text(start):
            raise ValueError("is a text file, not weights")
        if _MAX_HEADER < length <= size - 8:
            raise ValueError(f"header length {length} is more than {_MAX_HEADER:,} bytes, the most that is read")
        if length > size - 8:
            raise ValueError(f"header length {length} exceeds the file ({size} bytes): truncated, or something else")
        file.seek(8)
        text = file.read(length)
        # Counted before it is parsed, which takes seconds where there are hundreds of thousands.
        if (count := text.count(_OFFSETS)) > MAX_TENSORS:
            raise ValueError(too_many(count))
        table = json_fields.parse_object(text.decode("utf-8"), "the header").values
        if len(table) > MAX_TENSORS + 1:
            raise ValueError(too_many(len(table)))
        return Header(_entries(table, 8 + length, size), _metadata(table))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {reason(error)}") from error
    except WeightsError as error:
        raise WeightsError([f"{path}: {problem}" for problem in error.problems]) from error
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error


def too_many(count: int) -> str:
    """The problem of a file that names more tensors than `MAX_TENSORS`."""
    return f"names {count:,} tensors, more than {MAX_TENSORS:,}"


def _is_text(start: bytes) -> bool:
    return all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start)


def _metadata(table: Mapping[str, Any]) -> dict[str, str]:
    metadata = table.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must map names to strings")
    return metadata


def _entries(table: Mapping[str, Any], offset: int, size: int) -> dict[str, Entry]:
    entries = {name: _entry(name, value, offset) for name, value in table.items() if name != "__metadata__"}
    place, before = offset, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != place:
            how = "overlaps" if entry.start < place else "leaves a gap after"
            raise ValueError(f"{name} (bytes {entry.start - offset} to {entry.end - offset}) {how} {before}")
        place, before = entry.end, name
    if place != size:
        how = "is truncated" if place > size else "has bytes that belong to no tensor"
        raise ValueError(f"{how}: the header describes {place} bytes, the file has {size}")
    return entries


def _entry(name: str, value: Any, offset: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must be described by dtype, shape and data_offsets")
    code, shape, places = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{name} has dtype {code!r}; known are {', '.join(DTYPES)}")
    if isinstance(shape, list) and len(shape) > _MAX_DIMENSIONS:
        # Their product alone could take hours.
        raise ValueError(f"{name} has {len(shape)} dimensions, more than {_MAX_DIMENSIONS}")
    if not _sizes(shape) or not _sizes(places) or len(places) != 2:
        raise ValueError(f"{name} has shape {shape!r} and data_offsets {places!r}: both must be lists of sizes")
    start, end = places
    if math.prod(side for side in shape if side) >= 2**63:
        # Of no bytes where a side is 0, and still beyond what a tensor can be.
        raise ValueError(f"{name} has shape {shape!r}, beyond what can be counted")
    size = math.prod(shape) * DTYPES[code].itemsize
    if end - start != size:
        raise ValueError(f"{name} ({code} {shape}) needs {size} bytes, has {end - start}")
    return Entry(DTYPES[code], tuple(shape), offset + start, offset + end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)
