"""Files of unknown origin, opened and read within bounds: regular files only, no more bytes than were allowed.

A FIFO or a device blocks for ever or never ends, so neither is ever opened for reading.
"""

import os
import stat
from typing import BinaryIO

from functional_sd3.formats.errors import WeightsError, reason

MEBIBYTE = 2**20


def open_file(path: str | os.PathLike) -> BinaryIO:
    """The regular file at `path`, open for reading bytes. Raises WeightsError, naming `path`, for anything else."""
    try:
        # Without O_NONBLOCK opening a FIFO waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be opened: {reason(error)}") from error
    except ValueError as error:  # A zero character within a path.
        raise WeightsError(f"{path}: is not a path: {error}") from error
    try:
        kind = file_kind(os.fstat(descriptor).st_mode)
        if kind != "file":
            raise WeightsError(f"{path}: is a {kind}, not a file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | os.PathLike, limit: int) -> bytes:
    """The content of the regular file at `path`, of at most `limit` bytes. Raises WeightsError, naming `path`."""
    with open_file(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read: {reason(error)}") from error
    if len(content) > limit:
        raise WeightsError(f"{path}: is larger than {limit:,} bytes, the most that is read of such a file")
    return content


def read_text(path: str | os.PathLike, limit: int) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 that begins with a byte order mark; the mark is left out.

    Raises WeightsError, naming `path`, for other bytes.
    """
    return decode_text(read_bytes(path, limit), path)


def decode_text(content: bytes, where: object) -> str:
    """`content` as text, as in `read_text`; `where` is named in errors."""
    encoding = next((encoding for mark, encoding in _MARKS if content.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in content:
        # Latin letters in UTF-16 are valid UTF-8 too, with zeros between them, which no text has.
        raise WeightsError(f"{where}: is no text in UTF-8, it holds zeros (UTF-16 is recognised by a byte order mark)")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise WeightsError(
            f"{where}: is no text in {encoding.removesuffix('-sig').upper()}: byte {error.start} "
            f"({content[error.start]:#04x}); save it as UTF-8"
        ) from error


def file_kind(mode: int) -> str:
    """File type of a mode of `os.stat`: "file", "folder", "named pipe", "socket" or "device"."""
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISFIFO(mode):
        return "named pipe"
    return "socket" if stat.S_ISSOCK(mode) else "device"


# The mark of UTF-32 in little-endian order begins with that of UTF-16.
_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
