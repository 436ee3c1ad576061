"""safetensors files: headers read and checked, tensors mapped into memory, files written atomically.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of a JSON header, the header
(name -> dtype, shape, place of the bytes), the bytes. Nothing in it is executed.

Read and written here rather than by the library (measured with safetensors 0.8), which maps files as well, but:

- keeps the pages of a tensor that was copied into a fused matrix resident until the file is closed, so that the peak of
  memory is nearly twice the weights; `release` gives them back (tests/weights/test_memory.py);
- accepts a header that names a tensor twice (one of the two wins), or that names any number of tensors;
- writes tensors in the order of their names, in which query, key and value do not lie together, so that `stacked` would
  have to copy them, and needs all tensors in the target dtype in memory at once.
"""

import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from functional_sd3.formats import blocks, bounded, finite, json_fields
from functional_sd3.formats.atomic import replace_file
from functional_sd3.formats.errors import WeightsError, reason
from functional_sd3.formats.header import DTYPES, Header, read

CODES = {dtype: code for code, dtype in DTYPES.items()}
"""torch dtype -> its code in the format."""
# Where a file's tensors start: a cache line, so that kernels read mapped weights as fast as allocated ones.
_ALIGNMENT = 64
# Configs and indexes have some hundred kilobytes at most.
_MAX_JSON = 2**24


class Mapped(NamedTuple):
    """A file in memory: pages are read when touched, writes stay private to this process."""

    path: Path
    header: Header
    buffer: mmap.mmap


def read_header(path: str | os.PathLike) -> Header:
    """The checked header of a safetensors file; no tensor is read.

    Raises WeightsError when the file cannot be opened, is truncated or too long, or its header is not valid: bad
    length, not JSON, a name twice, unknown dtype, bytes that overlap, leave gaps or do not fit the shape.
    """
    with bounded.open_file(path) as file:
        return read(path, file)


def start(path: str | os.PathLike, count: int = 16) -> bytes:
    """The first bytes of a file, from which its kind is recognised."""
    with bounded.open_file(path) as file:
        try:
            return file.read(count)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read: {reason(error)}") from error


def shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, from the header alone."""
    return {name: entry.shape for name, entry in read_header(path).tensors.items()}


def open_mapped(path: str | os.PathLike) -> Mapped:
    """The file mapped copy-on-write: in-place updates of its tensors change this process's memory, never the file.

    A file that another program rewrites in place while it is mapped changes under us; `write_atomic` never does that.
    """
    with bounded.open_file(path) as file:
        return Mapped(Path(path), read(path, file), map_bytes(path, file))


def map_bytes(path: str | os.PathLike, file: BinaryIO) -> mmap.mmap:
    """All bytes of an open file, copy-on-write. Raises WeightsError, naming `path`, when the system refuses."""
    try:
        return mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        cause = reason(error) if isinstance(error, OSError) else error
        raise WeightsError(f"{path}: cannot be mapped into memory: {cause}") from error


def tensor(mapped: Mapped, name: str) -> Tensor:
    """One tensor of a mapped file, sharing its memory; copied where its place in the file is not aligned, or where its
    bytes are blocks."""
    dtype, shape, start, end, kind = mapped.header.tensors[name]
    if start == end:
        return torch.empty(shape, dtype=dtype, device="cpu")
    if kind:
        content = torch.frombuffer(mapped.buffer, dtype=torch.uint8, count=end - start, offset=start)
        return blocks.decode(kind, content).reshape(shape)
    if start % dtype.itemsize:
        copied = bytearray(mapped.buffer[start:end])
        release(mapped, name)
        return torch.frombuffer(copied, dtype=dtype).reshape(shape)
    return torch.frombuffer(mapped.buffer, dtype=dtype, count=math.prod(shape), offset=start).reshape(shape)


def shares(mapped: Mapped, name: str, value: Tensor) -> bool:
    """True if a tensor shares the memory of the mapped file, so is no copy."""
    entry = mapped.header.tensors[name]
    if entry.blocks or entry.start == entry.end or entry.start % entry.dtype.itemsize:
        return False
    return value.data_ptr() == torch.frombuffer(mapped.buffer, dtype=torch.uint8, count=1).data_ptr() + entry.start


def stacked(mapped: Mapped, names: Sequence[str]) -> Tensor | None:
    """Tensors one below the other, sharing the file's memory; None unless they lie one after the other in it."""
    entries = [mapped.header.tensors[name] for name in names]
    dtype, shape, start, *_ = entries[0]
    adjacent = all(before.end == after.start for before, after in pairwise(entries))
    alike = all(entry.dtype == dtype and not entry.blocks and entry.shape[1:] == shape[1:] for entry in entries)
    if not (shape and adjacent and alike) or start % dtype.itemsize or start == entries[-1].end:
        return None
    rows = sum(entry.shape[0] for entry in entries)
    count = rows * math.prod(shape[1:])
    return torch.frombuffer(mapped.buffer, dtype=dtype, count=count, offset=start).reshape(rows, *shape[1:])


def release(mapped: Mapped, name: str) -> None:
    """Give back the memory of a tensor that was copied elsewhere; reading it again reads the file again.

    Only for tensors that were not written to: private changes would be lost.
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
    Raises WeightsError when the system refuses or values are too large for `dtype`, ValueError for a dtype that the
    format lacks.
    """

    def put(temporary: Path) -> None:
        if isinstance(content, bytes | bytearray | memoryview):
            temporary.write_bytes(content)
        else:
            write(temporary, content, metadata=metadata, dtype=dtype)

    replace_file(path, put)


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
        if target not in CODES:
            raise ValueError(f"{name} has dtype {target}, which safetensors cannot hold; use one of {sorted(DTYPES)}")
    # Widest first, as the library does it: then every tensor is aligned to its own dtype. Otherwise in the order given,
    # so that what is read as one matrix lies together and `stacked` need not copy it.
    order = sorted(tensors, key=lambda name: -targets[name].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name in order:
        size = tensors[name].numel() * targets[name].itemsize
        header[name] = {
            "dtype": CODES[targets[name]],
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
                file.write(raw(_converted(name, tensors[name].detach(), targets[name])))


def _converted(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    converted = value.to("cpu", dtype)
    if dtype != value.dtype and finite.nonfinite_kind(converted) and not finite.nonfinite_kind(value):
        raise WeightsError(f"{name} holds values that {dtype} cannot: {value.abs().max().item():g} is the largest")
    return converted


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises WeightsError when it cannot be opened, is no object, or has a name twice."""
    return dict(json_fields.read(path, limit=_MAX_JSON).values)


def raw(value: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, row by row."""
    # Of one element, a tensor of any stride counts as contiguous, but cannot be viewed as bytes.
    return value.contiguous().as_strided((value.numel(),), (1,)).view(torch.uint8).numpy().data
