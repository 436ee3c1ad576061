"""A CSV log that grows by a row at a time and agrees with the checkpoint a run resumes from."""

import csv
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

from functional_sd3.weights import files


class Log(NamedTuple):
    """Where the log is, its columns (empty before the first row), and the seconds that earlier processes spent."""

    path: Path
    names: tuple[str, ...]
    seconds: float


def resume(path: Path, done: int) -> Log:
    """The log as it stood at step `done`: later rows, and one that a kill cut short, are dropped from the file."""
    rows = read(path)
    kept = [row for row in rows if int(row["step"]) <= done]
    names = tuple(kept[0]) if kept else ()
    if path.exists():
        files.write_atomic(path, _csv([names, *([row[name] for name in names] for row in kept)]).encode())
    return Log(path, names, float(kept[-1]["seconds"]) if kept else 0.0)


def append(log: Log, step: int, row: dict[str, float], seconds: float, *, durable: bool) -> Log:
    """Add a row, `seconds` being those of this process; `durable` waits until it is on the disk."""
    values = {"step": step, "seconds": f"{log.seconds + seconds:.3f}"}
    values |= {name: f"{value:.7g}" for name, value in row.items()}
    names = log.names or tuple(values)
    lines = [[values.get(name, "") for name in names]]
    try:
        log.path.parent.mkdir(parents=True, exist_ok=True)
        with open(log.path, "a", newline="") as file:
            file.write(_csv(lines if log.names else [names, *lines]))
            if durable:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise files.WeightsError(f"{log.path}: cannot be written: {error.strerror}") from error
    return log._replace(names=names)


def read(path: Path) -> list[dict[str, str]]:
    """The complete rows, in order; none when there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", errors="replace") as file:
        text = file.read()
    # What follows the last line end was being written when the process died.
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    return [row for row in rows if None not in row and None not in row.values() and row.get("step", "").isdecimal()]


def _csv(rows: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(row for row in rows if row)
    return text.getvalue()
