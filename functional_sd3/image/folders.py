"""Folders and zip archives of images, in order and lazily; each image is read by `files.read`.

Unreadable files become items with a reason instead of errors.
"""

import io
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from functional_sd3.formats.notes import note
from functional_sd3.formats.printable import shorten
from functional_sd3.image import files

if TYPE_CHECKING:
    from PIL.Image import Image

_CHUNK = 8
"""Number of images that a process reads at a time."""


class Skipped(NamedTuple):
    """A file that is not a readable image, and the reason."""

    path: str
    reason: str


class Source(NamedTuple):
    """A folder, or a zip archive, and the names of the images in it, sorted; none is read yet."""

    path: Path
    names: tuple[str, ...]


class Item(NamedTuple):
    """The result for one image: a value, or the reason why there is none."""

    name: str
    value: Tensor | None
    reason: str | None = None


def source(path: str | os.PathLike) -> Source:
    """The images below a folder, or in a zip archive, by the suffixes of their names; hidden ones are left out.

    Raises FileNotFoundError when there is no such path, ValueError when it is neither or has no images.
    """
    if not os.fspath(path):
        raise ValueError("the path of the images is empty")
    path = Path(path)
    names: Iterable[str]
    if path.is_dir():
        names = _in_folder(path)
    elif not path.exists():
        raise FileNotFoundError(2, "no such folder or zip archive", str(path))
    elif path.is_file() and zipfile.is_zipfile(path):
        with _archive(path) as archive:
            names = archive.namelist()
    else:
        raise ValueError(f"{path} is neither a folder of images nor a zip archive of them")
    names, suffixes = list(names), files.suffixes()
    chosen = sorted({name for name in names if is_shown(name) and Path(name).suffix.lower() in suffixes})
    unread = sorted(
        {name for name in names if is_shown(name) and Path(name).suffix.lower() in files.NOT_READ - suffixes}
    )
    some = ", ".join(shorten(name) for name in unread[:3]) + (", ..." if len(unread) > 3 else "")
    if not chosen:
        also = f", but {len(unread)} that cannot be read here: {some}" if unread else ""
        raise ValueError(f"{path} holds no images ({files.suffix_words()}){also}")
    if unread:
        note(f"{len(unread)} images of {shorten(path, 300)} cannot be read here and are left out: {some}")
    return Source(path, tuple(chosen))


def stream(source: Source, transform: Callable[["Image"], Tensor], *, workers: int = 0) -> Iterator[Item]:
    """`transform(image)` of every image, in the order of `source.names`, read lazily.

    `workers` processes read ahead (0: this one reads); they import the program anew, so `transform` must be a function
    of a module, or a partial of one, and a script must keep to `if __name__ == "__main__"`. A ValueError of the
    transform is an item's reason.
    """
    if workers < 0:
        raise ValueError(f"workers {workers} must be 0 (none besides this process) or more")
    if workers == 0:
        with _opened(source.path) as fetch:
            for name in source.names:
                yield _item(fetch, name, transform)
        return
    for items in _in_processes(source, transform, workers):
        for name, value, reason in items:
            yield Item(name, None if value is None else torch.from_numpy(value), reason)


def _in_folder(folder: Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise error

    entered = {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        # Links to folders are followed as those to files are, but no folder is entered twice.
        unvisited = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(root, name))
            if real not in entered and not name.startswith("."):
                entered.add(real)
                unvisited.append(name)
        folders[:] = unvisited
        yield from ((Path(root) / name).relative_to(folder).as_posix() for name in names)


def is_shown(name: str) -> bool:
    """False for hidden files, and for the metadata file that archives made on a Mac have beside each image."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError, UnicodeDecodeError, NotImplementedError) as error:
        raise ValueError(f"{path} is a broken zip archive: {error}") from None


@contextmanager
def _opened(path: Path) -> Iterator[Callable[[str], "Image"]]:
    """A function from names to images."""
    if path.is_dir():
        yield lambda name: files.read(path / name)
        return
    with _archive(path) as archive:
        yield lambda name: files.read(io.BytesIO(_bytes(archive, name)))


def _bytes(archive: zipfile.ZipFile, name: str) -> bytes:
    declared, method = archive.getinfo(name).file_size, archive.getinfo(name).compress_type
    # zipfile bounds the size that a read unpacks to for deflate only; other methods are read in small blocks.
    size = 2**20 if method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else 2**12
    content = bytearray()
    try:
        if declared > files.MAX_BYTES:
            raise ValueError(f"{declared:,} bytes, more than the {files.MAX_BYTES:,} that are read of one image")
        # A member unpacks to no more bytes than it declares.
        with archive.open(name) as member:
            while block := member.read(size):
                content += block
        return bytes(content)
    # Damage and encryption raise errors of zipfile, of zlib and others.
    except Exception as error:
        raise ValueError(f"cannot be taken out of the archive ({error or type(error).__name__})") from None


def _item(fetch: Callable[[str], "Image"], name: str, transform: Callable[["Image"], Tensor]) -> Item:
    try:
        return Item(name, transform(fetch(name)))
    except ValueError as error:
        return Item(name, None, str(error))


def _in_processes(source: Source, transform: Callable, workers: int) -> Iterator[list[tuple]]:
    """Chunks of items as arrays, in order; at most a few chunks a process ahead of the consumer."""
    from collections import deque
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import active_children, get_context

    chunks = [source.names[start : start + _CHUNK] for start in range(0, len(source.names), _CHUNK)]
    # Forking a process in which torch has threads can hang.
    context = get_context("spawn")
    others = set(active_children())
    pool = ProcessPoolExecutor(min(workers, len(chunks)), context, _start_worker, (source.path, transform))
    finished = False
    try:
        with _ignoring_interrupts():
            pending = deque(pool.submit(_work, chunk) for chunk in chunks[: 3 * workers])
        for chunk in chunks[3 * workers :]:
            yield pending.popleft().result()
            pending.append(pool.submit(_work, chunk))
        while pending:
            yield pending.popleft().result()
        finished = True
    finally:
        pool.shutdown(wait=finished, cancel_futures=True)
        # After an early end, by Ctrl-C for instance, images being read are not waited for.
        for process in set(active_children()) - others:
            process.terminate()


_worker: list = []
"""State of a reading process only: an archive's table is read once, not once for each image."""


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes started meanwhile ignore Ctrl-C from their first instant: it reaches every process of a terminal, and
    the first one ends the others."""
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start_worker(path: Path, transform: Callable) -> None:
    torch.set_num_threads(1)
    _worker[:] = [_opened(path), transform]
    _worker.append(_worker[0].__enter__())


def _work(names: tuple[str, ...]) -> list[tuple]:
    _, transform, fetch = _worker
    items = (_item(fetch, name, transform) for name in names)
    return [(item.name, None if item.value is None else item.value.numpy(), item.reason) for item in items]
