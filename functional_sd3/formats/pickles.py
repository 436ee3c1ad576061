"""Pickles: read are small state dicts alone (TAESD's by its author, Inception's), into mapped memory.

Nothing in a pickle is ever executed: `formats.state_dict` builds tensors and dicts within bounds and refuses the rest.
"""

import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from functional_sd3.formats import bounded, files, state_dict
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.files import Mapped
from functional_sd3.formats.header import Entry, Header
from functional_sd3.formats.magic import HOW_TO_CONVERT

MAX_BYTES = 64 * 2**20
"""Bytes: several times TAESD, far below any component of a model."""


def open_pickle(path: Path, limit: int = MAX_BYTES) -> Mapped:
    """The tensors of a pickled state dict of at most `limit` bytes, copied into memory. Raises WeightsError for
    everything else."""
    with bounded.open_file(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise WeightsError(f"{path}: {HOW_TO_CONVERT}")
    content = bounded.read_bytes(path, limit)
    try:
        state = state_dict.read(content)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    return _laid_out(path, state, len(content))


def _laid_out(path: Path, state: Mapping[str, Tensor], size: int) -> Mapped:
    """The tensors one after the other in memory, with the header that a safetensors file of them would have."""
    entries: dict[str, Entry] = {}
    place = 0
    for name, value in state.items():
        count = math.prod(value.shape) * value.dtype.itemsize
        place = -(-place // value.dtype.itemsize) * value.dtype.itemsize
        entries[name] = Entry(value.dtype, tuple(value.shape), place, place + count)
        place += count
        if place > 2 * size:
            raise WeightsError(f"{path}: claims more than the {size} bytes it has")
    buffer = mmap.mmap(-1, max(place, 1))
    for name, value in state.items():
        buffer[entries[name].start : entries[name].end] = files.raw(value.detach())
    return Mapped(path, Header(entries, {}), buffer)
