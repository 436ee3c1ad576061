"""Restarts by torchrun (--max-restarts): the command line resumes from the last checkpoint of its own run by itself.

torchrun starts all processes again, with the same arguments, when one has ended with an error. A file in --out says
which torchrun began the run there, so that no restart takes another's run for its own.
"""

import os
from pathlib import Path

from functional_sd3.formats import bounded, files
from functional_sd3.formats.errors import WeightsError
from functional_sd3.training import lock

NAME = ".train.torchrun"
_MAX_BYTES = 4096


def is_restart(out: Path) -> bool:
    """True if torchrun has started this command again that began the run in `out`, or was about to."""
    launcher = _launcher()
    if launcher is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    try:
        return bounded.read_bytes(out / NAME, _MAX_BYTES) == launcher
    except WeightsError:
        return False


def begin(out: Path) -> None:
    """Record the torchrun that begins or resumes the run in `out`."""
    if (launcher := _launcher()) is not None:
        files.write_atomic(out / NAME, launcher)


def end(out: Path) -> None:
    """Forget it, at the end of the run."""
    (out / NAME).unlink(missing_ok=True)


def _launcher() -> bytes | None:
    """The torchrun that this process is of: by its --rdzv-id, where it has one of its own, or as a process."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return None
    if name != "none":
        return name.encode("utf-8", "surrogateescape")[:_MAX_BYTES]
    return " ".join(map(str, lock.process(os.getppid())[:-1])).encode()
