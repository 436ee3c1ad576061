"""The CSV log of a run, appended row by row, cut back on resume to the checkpoint's step."""

import csv
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

from functional_sd3.formats import bounded, files
from functional_sd3.formats.errors import WeightsError, reason
from functional_sd3.formats.printable import shorten


class Log(NamedTuple):
    """Path of the log, its columns (empty before the first row), and the seconds of earlier processes."""

    path: Path
    names: tuple[str, ...]
    seconds: float


def resume(path: Path, done: int) -> Log:
    """The log as it stood at step `done`: later rows, and one that a kill cut short, are dropped from the file.

    Raises WeightsError as `read` does.
    """
    rows = read(path)
    rows = [row for row in rows if int(row["step"]) <= done]
    names = tuple(rows[0]) if rows else ()
    if path.exists():
        files.write_atomic(path, _csv([names, *([row[name] for name in names] for row in rows)]).encode())
    return Log(path, names, float(rows[-1]["seconds"]) if rows else 0.0)


def append(log: Log, step: int, row: dict[str, float], seconds: float, *, durable: bool) -> Log:
    """Add a row, `seconds` being those of this process; `durable` waits until it is on the disk.

    Raises WeightsError when the system refuses; the file is then as it was.
    """
    values = {"step": step, "seconds": f"{log.seconds + seconds:.3f}"}
    values |= {name: f"{value:.7g}" for name, value in row.items()}
    names = log.names or tuple(values)
    lines = [[values.get(name, "") for name in names]]
    try:
        log.path.parent.mkdir(parents=True, exist_ok=True)
        size = log.path.stat().st_size if log.path.exists() else 0
        try:
            with open(log.path, "ab") as file:
                file.write(_csv(lines if log.names else [names, *lines]).encode())
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        except OSError:
            # An incomplete row would corrupt the next one.
            os.truncate(log.path, size)
            raise
    except OSError as error:
        raise WeightsError(f"{log.path}: cannot be written: {reason(error)}") from error
    return log._replace(names=names)


def read(path: Path) -> list[dict[str, str]]:
    """The complete rows, in order; none when there is no file. Rows that a crash left cut or full of NULs are left out.

    Raises WeightsError, naming the file, when it cannot be read or its first line does not name the columns `step`,
    `seconds` and `loss`.
    """
    if not path.exists():
        return []
    text = bounded.read_bytes(path, _MAX_BYTES).decode(errors="replace")
    # Text after the last line end was being written when the process died.
    lines = io.StringIO(text[: text.rfind("\n") + 1], newline="")
    try:
        names, *rows = [row for row in csv.reader(lines) if row] or [[]]
    except csv.Error as error:
        raise WeightsError(f"{path}: is no CSV that can be read: {error}; {_REMEDY}") from error
    if not names:
        return []
    if len(set(names)) < len(names) or not set(_COLUMNS) <= set(names):
        raise WeightsError(
            f"{path}: its first line, {shorten(repr(text.partition(chr(10))[0]))}, must name each column once, "
            f"{', '.join(_COLUMNS)} among them; {_REMEDY}"
        )
    complete = [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]
    return [row for row in complete if all(_is_number(row[name]) for name in _COLUMNS) and row["step"].isdecimal()]


_COLUMNS = ("step", "seconds", "loss")
_MAX_BYTES = 2**30
_REMEDY = "move it away to go on with a new one"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return len(text) < 40


def _csv(rows: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(row for row in rows if row)
    return text.getvalue()
