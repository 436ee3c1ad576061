"""Arrays by name in .npz files: read within bounds, whole or not at all, written atomically; nothing is executed.

An .npz file is a zip archive of .npy files (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html).
Members are read here rather than by `numpy.load`, which allocates the size in a header before it compares it with the
file.
"""

import io
import math
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from functional_sd3.formats import bounded
from functional_sd3.formats.atomic import replace_file
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.printable import shorten

_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_MAX_BYTES = 2**34
"""Bytes of one array."""
_PART = 2**20
"""Bytes that are unpacked at a time."""
_SLACK, _RATIO = 2**24, 100
"""An array may unpack to 16 MiB and 100 times the bytes that it takes in the file."""
_MAX_MEMBERS = 1024
_MAX_HEADER = 2**14
"""Bytes of an .npy header; numpy reads 10,000."""
_KINDS = "fiubU"
"""Kinds of dtypes that are read: floats, whole numbers, truth values, texts."""
_BROKEN = (
    OSError, ValueError, EOFError, KeyError, IndexError, OverflowError, NotImplementedError, RuntimeError, struct.error,
    zlib.error, zipfile.BadZipFile,
)  # fmt: skip
"""Errors that `zipfile` and numpy's reader of headers raise for broken files."""


class Header(NamedTuple):
    """Header of a member: numpy's dtype and the shape."""

    dtype: Any
    shape: tuple[int, ...]


def headers(path: str | os.PathLike, what: str) -> dict[str, Header]:
    """The dtype and shape of every array of a file, of which none is read. Errors as in `read`."""
    with _opened(path, what) as archive:
        arrays = {}
        for name, member in _members(path, what, archive).items():
            with archive.open(member) as file:
                arrays[name] = Header(*_header(path, name, file)[:2])
        return arrays


def read(path: str | os.PathLike, what: str, names: Collection[str]) -> dict[str, Any]:
    """The arrays of a file whose names are in `names`, in the machine's order of bytes; other members are not read.

    Raises WeightsError when the file is missing or broken and so no .npz file of `what`, and for members that are
    encrypted, packed by another method than deflate, no .npy file, of a dtype that is no float, number or text of at
    most 64 bits, or that unpack to more than 16 GiB or to 100 times their bytes in the file.
    """
    with _opened(path, what) as archive:
        members = _members(path, what, archive)
        return {name: _array(path, name, archive, members[name]) for name in names if name in members}


def write(path: str | os.PathLike, entries: Mapping[str, Any]) -> None:
    """Arrays, numbers and texts; the name of the file is kept as it is. Raises WeightsError when the system refuses."""
    import numpy

    def fill(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            numpy.savez(file, **entries)

    replace_file(path, fill)


@contextmanager
def _opened(path: str | os.PathLike, what: str) -> Iterator[zipfile.ZipFile]:
    with bounded.open_file(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except WeightsError:
            raise
        except MemoryError as error:
            raise WeightsError(f"{path}: an array of it is larger than the memory that is left") from error
        except _BROKEN as error:
            raise WeightsError(f"{path}: is not an .npz file of {what}: {shorten(error, 300)}") from error


def _members(path: str | os.PathLike, what: str, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members that are .npy files, by the names of their arrays."""
    infos = archive.infolist()
    if len(infos) > _MAX_MEMBERS:
        raise WeightsError(f"{path}: is not an .npz file of {what}: it has {len(infos):,} members")
    twice = [name for name, count in Counter(info.filename for info in infos).items() if count > 1]
    if twice:
        raise WeightsError(f"{path}: holds {shorten(twice[0])} {twice.count(twice[0]) + 1} times")
    members = {info.filename.removesuffix(".npy"): info for info in infos if info.filename.endswith(".npy")}
    if not members:
        names = ", ".join(shorten(info.filename, 40) for info in infos[:3]) or "nothing"
        raise WeightsError(f"{path}: is not an .npz file of {what}: it is a zip archive of {names}")
    for name, info in members.items():
        if info.flag_bits & 1:
            raise WeightsError(f"{path}: {shorten(name)} is encrypted; give the file without a password")
        if info.compress_type not in _METHODS:
            raise WeightsError(f"{path}: {shorten(name)} is packed by method {info.compress_type}, not by deflate")
    return members


def _header(path: str | os.PathLike, name: str, file: IO[bytes]) -> tuple[Any, tuple[int, ...], bool, int]:
    """numpy's dtype, the shape, whether the first index runs fastest, and where the values begin."""
    from numpy.lib import format as npy

    try:
        file = io.BytesIO(file.read(_MAX_HEADER))
        version = npy.read_magic(file)
        reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format")
        shape, fortran, dtype = reader(file)
    except (SyntaxError, TypeError, RecursionError, UnicodeDecodeError, *_BROKEN) as error:
        raise WeightsError(f"{path}: {shorten(name)} is no .npy file: {shorten(error, 200)}") from error
    if dtype.hasobject:
        raise WeightsError(f"{path}: {shorten(name)} holds Python objects, whose reading may run code")
    if dtype.kind not in _KINDS or (dtype.kind != "U" and dtype.itemsize > 8) or dtype.subdtype:
        wanted = "floats of at most 64 bits, whole numbers and texts"
        raise WeightsError(f"{path}: {shorten(name)} is {shorten(dtype)}; {wanted} are read: save it as float64")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise WeightsError(f"{path}: {shorten(name)} is no .npy file: its shape is {shorten(shape)}")
    return dtype, shape, fortran, file.tell()


def _array(path: str | os.PathLike, name: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    import numpy

    with archive.open(member) as file:
        dtype, shape, fortran, start = _header(path, name, file)
    with archive.open(member) as file:
        size = math.prod(shape) * dtype.itemsize
        most = min(_MAX_BYTES, _SLACK + _RATIO * member.compress_size)
        if size > most:
            raise WeightsError(
                f"{path}: {shorten(name)} says that it has {size:,} bytes (shape {shorten(list(shape))}); of "
                f"{member.compress_size:,} bytes in the file at most {most:,} are unpacked"
            )
        if start + size != member.file_size:
            raise WeightsError(f"{path}: {shorten(name)} has other than the {size:,} bytes that its shape needs")
        file.read(start)
        content = numpy.empty(size, numpy.uint8)
        view, place = content.data, 0
        while place < size and (part := file.read(min(_PART, size - place))):
            view[place : place + len(part)] = part
            place += len(part)
        # Reading on to the end is what checks the sum of the bytes.
        if place < size or file.read(1):
            raise WeightsError(f"{path}: {shorten(name)} has other than the {size:,} bytes that its shape needs")
    array = content.view(dtype).reshape(shape, order="F" if fortran else "C")
    return numpy.ascontiguousarray(array, dtype.newbyteorder("=")).reshape(shape)
