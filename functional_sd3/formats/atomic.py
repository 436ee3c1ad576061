"""Files and folders that are replaced whole or not at all.

A file is written beside its target, synced to disk and renamed over it: at every moment the name holds the old content
or the new. A new folder likewise. The content of a folder that exists is replaced in three steps, because no portable
call swaps two folders and because what else lies in it (logs, checkpoints, a README) must stay:

1. everything is written to a staging folder inside it and synced: a failure here leaves the old content as it was;
2. the staging folder is renamed to `.saved`: from this instant the new content counts, and `current(folder)` is its
path;
3. each entry is put in its place (by hard links, so it costs nothing), then `.saved` is removed.

A process killed before 2 leaves the old content, after 2 the new one, for readers that call `current`, as
`weights.load` does; the next save completes it. Other programs, which do not call it, may meet entries of both
only if the process died in the milliseconds of step 3. Two processes must not replace one folder at the same time.

A `.saved` counts only where a save of this program put it: it holds its own number in the file system and that of the
folder it is in, which no archive, download or copy of a folder can know. Every other `.saved` is a file of no meaning.
"""

import os
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from functional_sd3.formats import bounded
from functional_sd3.formats.errors import WeightsError, reason

Result = TypeVar("Result")
_ATTEMPTS = 5
_SAVED = ".saved"
_PROOF = ".written-by-save"
_PARTIAL = ".partial"


def replace_file(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Put at `path` the file that `write(temporary path)` makes, atomically and durably.

    A link is written through: the file it leads to is replaced. A file that was there gives the new one its mode.
    Raises WeightsError when the system refuses (full disk, no permission, a folder, device or pipe in the way): `path`
    is untouched.
    """
    path, mode = _target(Path(path))
    temporary = _temporary(path.parent, path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent, path.name)
        try:
            write(temporary)
            if mode is not None:
                os.chmod(temporary, mode)
            _sync(temporary)
        except BaseException:
            _remove(temporary)
            raise
        _move(temporary, path)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written: {reason(error)}; what was there is untouched") from error
    _confirm(path)


def _target(path: Path) -> tuple[Path, int | None]:
    """The place a file is written to, behind links, and the mode of the file that is there."""
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    try:
        status = os.lstat(path)
    except OSError:
        return path, None
    kind = "link in a circle" if stat.S_ISLNK(status.st_mode) else bounded.file_kind(status.st_mode)
    if kind != "file":
        raise WeightsError(f"{path}: cannot be written: is a {kind}; what was there is untouched")
    return path, stat.S_IMODE(status.st_mode)


def replace_folder(path: str | os.PathLike, write: Callable[[Path], None], owned: Collection[str]) -> None:
    """Put at `path` the folder that `write(temporary folder)` fills, as the module says.

    owned: the names at the top of the folder that belong to what is written; those that `write` does not make are
    removed, all other entries of an existing folder stay. Raises WeightsError when the system refuses.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            _sweep(path, "save")
            if _is_ours(path):
                _install(path, owned)
            elif os.path.lexists(path / _SAVED):
                raise WeightsError(f"{path / _SAVED}: is in the way and was not written by a save here: move it away")
            _move(_stage(_temporary(path, "save"), write, proof=path), path / _SAVED)
        else:
            _sweep(path.parent, path.name)
            _move(_stage(_temporary(path.parent, path.name), write), path)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written: {reason(error)}; what was there still loads") from error
    if not _is_ours(path):
        _confirm(path)
        return
    try:
        _install(path, owned)
    except OSError as error:
        message = f"{path}: is saved in {_SAVED} and loads, but cannot be put in its place: {reason(error)}"
        raise WeightsError(message) from error


def current(folder: Path) -> Path:
    """Path of the content of a folder of `replace_folder`: the folder itself or, after an interruption, `.saved`."""
    return folder / _SAVED if _is_ours(folder) else folder


def _is_ours(folder: Path) -> bool:
    """True if the folder has a `.saved` that a save put there."""
    saved = folder / _SAVED
    try:
        if not stat.S_ISDIR(os.lstat(saved).st_mode) or not stat.S_ISREG(os.lstat(saved / _PROOF).st_mode):
            return False
        return bounded.read_bytes(saved / _PROOF, 100) == _proof(saved, folder)
    except (OSError, WeightsError):
        return False


def _proof(saved: Path, folder: Path) -> bytes:
    return f"{os.lstat(saved).st_ino} in {os.stat(folder).st_ino}\n".encode()


def read_stable(path: Path, read: Callable[[Path], Result], owned: Collection[str]) -> Result:
    """`read(where the content is)`, again if the folder was replaced meanwhile: never the halves of two contents."""
    for _ in range(_ATTEMPTS):
        before = _stamp(path, owned)
        try:
            result = read(current(path))
        except WeightsError:
            if _stamp(path, owned) == before:
                raise
            continue
        if _stamp(path, owned) == before:
            return result
    raise WeightsError(f"{path}: was replaced each of the {_ATTEMPTS} times it was read")


def _stamp(path: Path, owned: Collection[str]) -> list[tuple[int, int] | None]:
    return [_identity(path / name) for name in (*sorted(owned), _SAVED)]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _stage(staging: Path, write: Callable[[Path], None], proof: Path | None = None) -> Path:
    """The folder `staging`, filled and synced; proof: the folder in which it is to count as saved."""
    try:
        staging.mkdir()
        write(staging)
        if proof is not None:
            (staging / _PROOF).write_bytes(_proof(staging, proof))
        for folder, _, files in os.walk(staging, topdown=False):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
    except BaseException:
        _remove(staging)
        raise
    return staging


def _move(temporary: Path, path: Path) -> None:
    try:
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise


def _confirm(path: Path) -> None:
    """Wait until the disk holds the new name too, not only what it names."""
    try:
        _sync(path.parent)
    except OSError as error:
        raise WeightsError(f"{path}: is written, but the disk did not confirm it: {reason(error)}") from error


def _install(path: Path, owned: Collection[str]) -> None:
    """Step 3: the content of `.saved` takes its place. May be repeated after an interruption at any point."""
    _sync(path)
    saved, replaced = path / _SAVED, _temporary(path, "save")
    replaced.mkdir()
    try:
        made = sorted(entry.name for entry in saved.iterdir() if entry.name != _PROOF)
        for name in sorted({*owned, *made}):
            if os.path.lexists(path / name):
                os.rename(path / name, replaced / name)
            if name in made:
                _link(saved / name, path / name)
        _sync(path)
        os.rename(saved, replaced / _SAVED)
        _sync(path)
    finally:
        _remove(replaced)


def _link(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_file)
        _sync(target)
    else:
        _link_file(source, target)


def _link_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # A file system without hard links.
        shutil.copyfile(source, target)
        _sync(Path(target))


def _temporary(folder: Path, name: str) -> Path:
    """A unique path in the folder whose name holds its process and purpose."""
    return folder / f".{name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}{_PARTIAL}"


def _sweep(folder: Path, name: str) -> None:
    """Remove what processes of this machine left of `name` when they were killed."""
    prefix = f".{name}.{socket.gethostname()}-"
    for left in folder.iterdir():
        process = left.name.removeprefix(prefix).split("-")[0]
        if left.name.startswith(prefix) and left.name.endswith(_PARTIAL) and process.isdigit():
            if not _alive(int(process)):
                _remove(left)


def _alive(process: int) -> bool:
    if os.name != "posix":
        # Elsewhere signal 0 is not a question but a blow.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Ask the system to put a file's or folder's content on the disk before going on."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
