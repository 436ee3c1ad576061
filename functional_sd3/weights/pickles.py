"""Pickles: what they are refused with, and the one kind that is read, the author's `.pth` files of TAESD.

Nothing in a pickle is ever executed: torch's restricted reader (`weights_only=True`) builds tensors and dicts and
refuses the rest. It is let near small uncompressed archives only, whose tensors must lie in the bytes that are there.
"""

import io
import math
import mmap
import zipfile
from pathlib import Path
from typing import Any

import torch

from functional_sd3.formats.errors import WeightsError, reason
from functional_sd3.weights import files
from functional_sd3.weights.files import Mapped
from functional_sd3.weights.header import Entry, Header
from functional_sd3.weights.kinds import HOW_TO_CONVERT

LARGEST = 64 * 2**20
"""Bytes: several times TAESD, far below any other component."""


def open_pickle(path: Path) -> Mapped:
    """The tensors of a small pickled state dict, copied into memory. Raises WeightsError for everything else."""
    try:
        if path.stat().st_size > LARGEST:
            raise WeightsError(f"{path}: {HOW_TO_CONVERT}")
        content = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {reason(error)}") from error
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, RecursionError) as error:
        raise WeightsError(f"{path}: is a broken archive: {error}") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise WeightsError(f"{path}: is a compressed archive, which torch does not write")
    if sum(entry.file_size for entry in entries) > len(content):
        raise WeightsError(f"{path}: is a broken archive: its entries are larger than the file")
    try:
        state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # Whatever a hostile pickle makes torch raise.
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path}: is no pickle of weights alone: {first}") from error
    return _laid_out(path, state, len(content))


def _laid_out(path: Path, state: Any, size: int) -> Mapped:
    """The tensors one after the other in memory, with the header that a safetensors file of them would have."""
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path}: holds a {type(state).__name__}, not names with tensors")
    entries: dict[str, Entry] = {}
    place = 0
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            raise WeightsError(f"{path}: {name!r} is no plain tensor")
        count = math.prod(value.shape) * value.dtype.itemsize
        if value.is_meta or value.dtype not in files.CODES or count > value.untyped_storage().nbytes():
            raise WeightsError(f"{path}: {name} {list(value.shape)} does not hold the values it claims")
        place = -(-place // value.dtype.itemsize) * value.dtype.itemsize
        entries[name] = Entry(value.dtype, tuple(value.shape), place, place + count)
        place += count
        if place > 2 * size:
            raise WeightsError(f"{path}: claims more than the {size} bytes it has")
    buffer = mmap.mmap(-1, max(place, 1))
    for name, value in state.items():
        buffer[entries[name].start : entries[name].end] = files.raw(value.detach())
    return Mapped(path, Header(entries, {}), buffer)
