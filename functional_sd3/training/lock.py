"""Lock of a training folder: one run at a time; a killed run does not keep it.

The system's lock (flock) ends with the process that holds it. The content of the lock file names the holder in errors,
and decides alone where flock is missing or does not reach: another machine that shares the folder.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from functional_sd3.formats import bounded, json_fields
from functional_sd3.formats.errors import WeightsError, reason
from functional_sd3.formats.printable import shorten

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

NAME = ".train.lock"
_MAX_BYTES = 4096
_ATTEMPTS = 5


class Holder(NamedTuple):
    """A process: its number, machine, the boot of that machine, the clock tick of its start, and when it took the lock.

    boot and tick: "" where the system does not give them.
    """

    pid: int
    host: str
    boot: str
    tick: str
    since: str


@contextmanager
def hold(folder: str | os.PathLike, note: Callable[[str], None]) -> Iterator[None]:
    """Context that holds the lock of a folder, which is created with its parents if missing, and removed if left empty.

    The lock of a process that has ended is taken over, with a `note`. Raises WeightsError, naming the holder and what
    to do, while another run holds it, and where a file that cannot be read is in its place.
    """
    folder = Path(folder)
    path = folder / NAME
    created = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path, note)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written: {reason(error)}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)
        with suppress(OSError):
            for each in created:
                each.rmdir()


def this_process() -> Holder:
    """This process, as the holder of a lock that it takes now."""
    return process(os.getpid())


def process(pid: int) -> Holder:
    """A process of this machine at this moment."""
    return Holder(pid, socket.gethostname(), _boot(), _tick(pid), time.strftime("%Y-%m-%d %H:%M:%S"))


def is_running(holder: Holder) -> bool:
    """True if a process of this machine still runs; a later process of the same number is another one."""
    if holder.boot != _boot():
        return False
    if os.name == "posix":
        try:
            os.kill(holder.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except OSError:  # Another user's process.
            pass
    return holder.tick == _tick(holder.pid)


def _acquire(path: Path, note: Callable[[str], None]) -> int:
    for _ in range(_ATTEMPTS):
        descriptor, is_created = _open(path)
        try:
            has_lock = _flock(descriptor)
            holder = None if is_created else _read(path, has_lock)
            if holder:
                _check(path, holder, has_lock)
            if _is_current(path, descriptor):
                if holder:
                    note(f"note: process {holder.pid}, which held the lock of this folder, has ended; it is taken over")
                content = json.dumps(this_process()._asdict()).encode()
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, content, 0) if hasattr(os, "pwrite") else os.write(descriptor, content)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # Its holder removed it between our opening and locking it.
        os.close(descriptor)
    raise WeightsError(f"{path}: was taken by other processes {_ATTEMPTS} times; try again")


def _open(path: Path) -> tuple[int, bool]:
    """Descriptor of the lock file, and True if it was created. Links are not followed, pipes not waited for."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
    except FileExistsError:
        return os.open(path, flags), False


def _flock(descriptor: int) -> bool | None:
    """True: locked; False: another process has it locked; None: the file system does not lock."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _read(path: Path, has_lock: bool | None) -> Holder | None:
    """The holder that the file names; None for an empty unlocked file. Raises WeightsError for other content."""
    content = bounded.read_bytes(path, _MAX_BYTES)
    if not content:
        if has_lock:
            return None
        raise WeightsError(f"{path}: another run is starting in this folder{_remedy(path)}")
    try:
        fields = json_fields.parse_object(content, path)
        texts = (fields.text(name, longest=200) for name in ("host", "boot", "tick", "since"))
        return Holder(fields.integer("pid", low=1), *texts)
    except WeightsError as error:
        raise WeightsError([*error.problems, f"{path}: does not say whose lock it is{_remedy(path)}"]) from error


def _check(path: Path, holder: Holder, has_lock: bool | None) -> None:
    since, here = f"since {shorten(holder.since)}", holder.host == socket.gethostname()
    if has_lock is False or (here and has_lock is None and is_running(holder)):
        where = "" if here else f" on {shorten(holder.host)}"
        raise WeightsError(
            f"{path.parent} is being trained in by process {holder.pid}{where} {since}: "
            "wait for it, stop it, or name another folder with --out"
        )
    if not here:
        raise WeightsError(
            f"{path.parent} is held {since} by process {holder.pid} on another machine, {shorten(holder.host)}, where "
            f"this one cannot look{_remedy(path)}"
        )


def _remedy(path: Path) -> str:
    return f"; if no run is going on there, delete {path} and try again"


def _is_current(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _tick(pid: int) -> str:
    """Start of a process, in clock ticks since the boot; "" where the system does not give it."""
    with suppress(OSError, IndexError):
        # The process's name, in parentheses, may contain spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    return ""
