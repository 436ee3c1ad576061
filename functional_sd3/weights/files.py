"""safetensors files: headers read and checked, tensors mapped into memory, files written atomically.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of a JSON header, the header
(name -> dtype, shape, place of the bytes), the bytes. Nothing in it is executed. Read here rather than by the library
because a mapping of our own keeps the memory at the weights, once: pages that were copied into a fused matrix can be
given back.
"""

import json
import math
import mmap
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from functional_sd3.weights.atomic import replace_file
from functional_sd3.weights.errors import WeightsError, reason

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
    "C64": torch.complex64,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000
# Where a file's tensors start: a cache line, so that kernels read mapped weights as fast as allocated ones.
_ALIGNMENT = 64


class Entry(NamedTuple):
    """One tensor of a file: `start` and `end` are places in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    """What a file says it holds."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


class Mapped(NamedTuple):
    """A file in memory: pages are read when touched, writes stay private to this process."""

    path: Path
    header: Header
    buffer: mmap.mmap | None


def read_header(path: str | os.PathLike) -> Header:
    """The checked header of a safetensors file; no tensor is read.

    Raises WeightsError when the file cannot be opened, is truncated or too long, or its header is not valid: bad
    length, not JSON, a name twice, unknown dtype, bytes that overlap, leave gaps or do not fit the shape.
    """
    with _open(path) as file:
        return _header(path, file)


def shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, from the header alone."""
    return {name: entry.shape for name, entry in read_header(path).tensors.items()}


def open_mapped(path: str | os.PathLike) -> Mapped:
    """The file mapped copy-on-write: in-place updates of its tensors change this process's memory, never the file.

    A file that another program rewrites in place while it is mapped changes under us; `write_atomic` never does that.
    """
    with _open(path) as file:
        header = _header(path, file)
        size = os.fstat(file.fileno()).st_size
        try:
            return Mapped(Path(path), header, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY))
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path}: cannot be mapped into memory: {error}") from error


def tensor(mapped: Mapped, name: str) -> Tensor:
    """One tensor of a mapped file, sharing its memory (copied only where its place in the file is not aligned)."""
    dtype, shape, start, end = mapped.header.tensors[name]
    if start == end:
        return torch.empty(shape, dtype=dtype)
    if start % dtype.itemsize:
        return torch.frombuffer(bytearray(mapped.buffer[start:end]), dtype=dtype).reshape(shape)
    return torch.frombuffer(mapped.buffer, dtype=dtype, count=math.prod(shape), offset=start).reshape(shape)


def release(mapped: Mapped, name: str) -> None:
    """Give back the memory of a tensor that was copied elsewhere; reading it again reads the file again.

    Only for tensors that nobody has written to: private changes would be lost.
    """
    entry = mapped.header.tensors[name]
    first = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = entry.end // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        mapped.buffer.madvise(mmap.MADV_DONTNEED, first, last - first)


def write_atomic(
    path: str | os.PathLike,
    content: bytes | Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Put bytes, or tensors as safetensors, at `path`: the whole file or, on any failure, what was there before.

    Tensors may be of any layout and device and are converted to `dtype` (floating ones only) one at a time.
    Raises WeightsError when the system refuses, ValueError for a dtype that the format lacks.
    """
    if isinstance(content, bytes | bytearray | memoryview):
        replace_file(path, lambda temporary: temporary.write_bytes(content) and None)
    else:
        replace_file(path, lambda temporary: write(temporary, content, metadata=metadata, dtype=dtype))


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a safetensors file in place; `write_atomic` is what keeps an old one on failure."""
    targets = {name: dtype if dtype and value.is_floating_point() else value.dtype for name, value in tensors.items()}
    for name, target in targets.items():
        if target not in _CODES:
            raise ValueError(f"{name} has dtype {target}, which safetensors cannot hold; use one of {sorted(DTYPES)}")
    # Widest first, as the library does it: then every tensor is aligned to its own dtype.
    order = sorted(tensors, key=lambda name: -targets[name].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name in order:
        size = tensors[name].numel() * targets[name].itemsize
        header[name] = {
            "dtype": _CODES[targets[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            if tensors[name].numel():
                file.write(_bytes(tensors[name].detach().to("cpu", targets[name])))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises WeightsError when it cannot be opened, is no object, or has a name twice."""
    with _open(path) as file:
        try:
            return _parse(file.read())
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read: {reason(error)}") from error
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{path}: not a valid JSON object: {error}") from error


def _open(path: str | os.PathLike) -> BinaryIO:
    try:
        # Asked before opening: a pipe in place of a file would wait for a writer for ever.
        kind = os.stat(path).st_mode
        if stat.S_ISREG(kind):
            return open(path, "rb")
    except OSError as error:
        raise WeightsError(f"{path}: cannot be opened: {reason(error)}") from error
    except ValueError as error:
        raise WeightsError(f"{str(path)!r}: is not a path: {error}") from error
    raise WeightsError(f"{path}: is a {'folder' if stat.S_ISDIR(kind) else 'device or pipe'}, not a file")


def _header(path: str | os.PathLike, file: BinaryIO) -> Header:
    try:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            raise ValueError(f"{size} bytes are too few for a safetensors file: truncated, or something else")
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"header length {length} exceeds the file ({size} bytes): truncated, or something else")
        table = _parse(file.read(length))
        return Header(_entries(table, 8 + length, size), _metadata(table))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: {error}") from error


def _parse(text: bytes) -> dict[str, Any]:
    table = json.loads(text.decode("utf-8"), object_pairs_hook=_distinct)
    if not isinstance(table, dict):
        raise ValueError(f"holds {type(table).__name__} where an object is needed")
    return table


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r} is named twice")
    return table


def _metadata(table: dict[str, Any]) -> dict[str, str]:
    metadata = table.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must map names to strings")
    return metadata


def _entries(table: dict[str, Any], offset: int, size: int) -> dict[str, Entry]:
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
    if not _sizes(shape) or not _sizes(places) or len(places) != 2:
        raise ValueError(f"{name} has shape {shape!r} and data_offsets {places!r}: both must be lists of sizes")
    start, end = places
    size = math.prod(shape) * DTYPES[code].itemsize
    if end - start != size:
        raise ValueError(f"{name} ({code} {shape}) needs {size} bytes, has {end - start}")
    return Entry(DTYPES[code], tuple(shape), offset + start, offset + end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _bytes(value: Tensor) -> memoryview:
    return memoryview(value.contiguous().reshape(-1).view(torch.uint8).numpy())
