"""What the study measured, a row of a CSV file for each model and way of drawing."""

import csv
import io
from pathlib import Path
from typing import NamedTuple

from functional_sd3.formats import files


class Row(NamedTuple):
    """A measurement.

    run, seed: see `runs.Run`; "start" is the model that all start from. minutes: the mark, and cpu_seconds what was
    spent on training by then, in how many updates. things, steps, cfg, images: how many images of captions of one or
    two things were drawn, and how. right, outlines: shares of them that are right to the reader that rewards and to
    the other; colours: mean of the proxy reward. place, side, distance: of `spread.Spread`, the first two over the
    world's. note: what ended a run early.
    """

    run: str
    seed: int
    minutes: float
    cpu_seconds: float
    updates: int
    things: int = 0
    steps: int = 0
    cfg: float = 1.0
    images: int = 0
    right: float | None = None
    outlines: float | None = None
    colours: float | None = None
    place: float | None = None
    side: float | None = None
    distance: float | None = None
    note: str = ""
    processor: str = ""
    command: str = ""

    @property
    def of(self) -> tuple:
        """What was measured: the same of two rows that measure the same."""
        return self.run, self.seed, self.minutes, self.things, self.steps, self.cfg


_WHOLE = ("seed", "updates", "things", "steps", "images")
_TEXTS = ("run", "note", "processor", "command")


def read(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file. Raises ValueError for another table, naming the columns."""
    if not path.exists():
        return []
    lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
    if not lines or tuple(lines[0]) != Row._fields:
        raise ValueError(f"{path}: its first line must name the columns {', '.join(Row._fields)}")
    return [Row(*map(_value, Row._fields, line)) for line in lines[1:]]


def write(path: Path, rows: list[Row]) -> None:
    """Write all rows, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Row._fields, *(map(_text, row) for row in rows)])
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, text.getvalue().encode())


def add(path: Path, row: Row) -> None:
    """Add a row, in place of one that measured the same."""
    write(path, [*(each for each in read(path) if each.of != row.of), row])


def _value(name: str, text: str):
    if name in _TEXTS:
        return text
    if name in _WHOLE:
        return int(text)
    return float(text) if text else None


def _text(value) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
