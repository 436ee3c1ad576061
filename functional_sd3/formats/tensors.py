"""Every tensor of a file by name, whatever its format: safetensors, GGUF, or the index of several safetensors files."""

import os
from pathlib import Path

from functional_sd3.formats import files, gguf, magic, shards
from functional_sd3.formats.files import Mapped


def open_tensors(path: str | os.PathLike) -> dict[str, Mapped]:
    """Name -> the mapped file it is in; no value is read. Raises WeightsError, naming the file, for anything else."""
    path = Path(path)
    start = files.start(path)
    if start[8:9] != b"{" and start.lstrip().startswith(b"{"):
        return shards.open_indexed(path)
    mapped = gguf.open_gguf(path) if start.startswith(magic.GGUF) and start[8:9] != b"{" else files.open_mapped(path)
    return dict.fromkeys(mapped.header.tensors, mapped)
