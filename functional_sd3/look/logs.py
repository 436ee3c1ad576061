"""Logs of training as columns, and charts of them: of train, distill, reward or any CSV with a column `step`."""

import csv
import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from functional_sd3.formats import bounded
from functional_sd3.formats.printable import shorten
from functional_sd3.look.plotting import COLOURS, Chart

FILE = "log.csv"
"""Name of the log in the folder of a run."""
_MAX_BYTES = 2**30
_MAX_STEP = 2.0**53
_MAX_VALUE = 1e100
"""Axes of larger numbers overflow; larger values count as infinite."""
_SMOOTHED = 100
"""A line of more points has its running mean beside it."""
_NUMBERED = re.compile(r"(.+)_(\d+)")
_TITLES = {
    "loss": "loss",
    "grad_norm": "norm of the gradient, before it is clipped",
    "rate": "learning rate",
    "bin": "loss by t",
    "seconds": "seconds since the start",
}


class Log(NamedTuple):
    """A log: its columns of numbers by name, NaN where a row has none, the columns that are no numbers, and sentences
    on rows and values that no chart shows."""

    name: str
    columns: dict[str, list[float]]
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> list[float]:
        return self.columns["step"]


def read(path: str | os.PathLike[str]) -> Log:
    """The log at a path, or `log.csv` in a folder. Every column is kept, or named in `left_out`.

    Raises ValueError for a file that is not there or is no CSV with a column `step` and a row.
    """
    if not os.fspath(path):
        raise ValueError(f"the path of a log is empty; name a {FILE}, or the folder that it is in")
    place = Path(path)
    place = place / FILE if place.is_dir() else place
    if not place.is_file():
        raise ValueError(f"{place}: there is no such log; train, distill and reward write {FILE} into their --out")
    # Spreadsheets write a byte order mark, which "utf-8-sig" leaves out.
    text = bounded.read_bytes(place, _MAX_BYTES).decode("utf-8-sig", errors="replace").replace("\0", "")
    if not text.strip():
        raise ValueError(f"{place}: is empty; a log is a CSV with a column step")
    try:
        names, *rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row] or [[]]
    except csv.Error as error:
        raise ValueError(f"{place}: is no CSV that can be read: {error}") from error
    if "step" not in names or len(set(names)) < len(names):
        first = shorten(repr(text.lstrip("\r\n").partition("\n")[0]))
        raise ValueError(f"{place}: its first line, {first}, must name each column once, step among them")
    # A row that was cut short by a crash has fewer values.
    whole = [row for row in rows if len(row) == len(names)]
    columns = {name: [_number(row[index]) for row in whole] for index, name in enumerate(names)}
    kept = [abs(step) <= _MAX_STEP for step in columns["step"]]
    if not any(kept):
        raise ValueError(f"{place}: holds no row with a step")
    numbers, left_out, notes = {}, [], []
    if odd := len(rows) - len(whole):
        notes.append(f"{odd} of {len(rows)} rows have more or fewer values than there are columns")
    if stepless := len(whole) - sum(kept):
        notes.append(f"{stepless} of {len(rows)} rows have no step that is a number up to 2^53")
    steps = [step for step, keep in zip(columns["step"], kept, strict=True) if keep]
    for index, (name, values) in enumerate(columns.items()):
        texts = [row[index].strip() for row, keep in zip(whole, kept, strict=True) if keep]
        values = [value for value, keep in zip(values, kept, strict=True) if keep]
        pairs = zip(texts, values, strict=True)
        words = any(text and math.isnan(value) and text.lower() != "nan" for text, value in pairs)
        if words or all(map(math.isnan, values)):
            left_out.append(name)
        else:
            numbers[name] = values
            # An empty text is a column that the row does not have; a loss that became NaN is news.
            bad = [
                step
                for step, text, value in zip(steps, texts, values, strict=True)
                if text and not math.isfinite(value)
            ]
            if bad:
                notes.append(
                    f"{len(bad)} of {len(values)} values of {name} are not finite, the first at step {bad[0]:g}"
                )
    return Log(str(path), numbers, tuple(left_out), tuple(notes))


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return math.copysign(math.inf, value) if abs(value) > _MAX_VALUE else value


def charts(logs: Sequence[Log]) -> dict[str, Chart]:
    """A chart for each column of any of the logs, over the steps, with a line for each log; numbered columns of one
    log, such as the loss by t, are in one chart."""
    names = list(dict.fromkeys(name for log in logs for name in log.columns if name != "step"))
    grouped: dict[str, list[str]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name) if len(logs) == 1 else None
        grouped.setdefault(match[1] if match else name, []).append(name)
    first = ("loss", "bin", *(name for name in grouped if name.startswith("bin_")), "rate", "grad_norm")
    ordered = [name for name in first if name in grouped] + [name for name in grouped if name not in first]
    return {name: _chart(name, grouped[name], logs, names) for name in ordered}


def _chart(title: str, columns: Sequence[str], logs: Sequence[Log], every: Sequence[str]) -> Chart:
    bins = sum(name.startswith("bin_") for name in every)
    title_words = _title(title, bins)
    lines = [
        (_label(name, log, len(logs), len(columns), bins), log.steps, log.columns[name])
        for log in logs
        for name in columns
        if name in log.columns
    ]
    values = [value for _, _, of_line in lines for value in of_line if math.isfinite(value)]
    is_log = title != "seconds" and bool(values) and min(values) > 0 and max(values) > 20 * min(values)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for index, (label, steps, of_line) in enumerate(lines):
            points = [(step, value) for step, value in zip(steps, of_line, strict=True) if math.isfinite(value)]
            colour = COLOURS[index % len(COLOURS)]
            many, marker = len(points) > _SMOOTHED, "o-" if len(points) < 30 else "-"
            if not points:
                continue
            pale = {"alpha": 0.25} if many else {"label": label}
            axes.plot(*zip(*points, strict=True), marker, color=colour, **pale)
            if many:
                axes.plot(*zip(*smoothed(points), strict=True), color=colour, label=label)
        axes.set(xlabel="step", title=title_words)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if is_log:
            axes.set_yscale("log")
        if len(lines) > 1:
            # "best" would try many places against every point.
            figure.legend(loc="outside lower center", ncols=1 if len(logs) > 1 else 2)

    ends = ", ".join(f"{label or title} {last(of_line):.4g}" for label, _, of_line in lines)
    height = 2.7 + 0.16 * len(lines) if len(lines) > 1 else 2.7
    return Chart(draw, f"{title_words} over the steps; at the end: {ends}.", (4.2, height))


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean of every point and those around it, a fiftieth of them all."""
    around = max(1, len(points) // 100)
    means = []
    for index, (step, _) in enumerate(points):
        near = points[max(0, index - around) : index + around + 1]
        means.append((step, sum(value for _, value in near) / len(near)))
    return means


def _title(name: str, bins: int) -> str:
    match = _NUMBERED.fullmatch(name)
    if match and match[1] == "bin":
        return f"loss of t in {_interval(int(match[2]), bins)}"
    return _TITLES.get(name, name)


def _label(name: str, log: Log, logs: int, columns: int, bins: int) -> str:
    match = _NUMBERED.fullmatch(name)
    of_column = f"t in {_interval(int(match[2]), bins)}" if match and match[1] == "bin" else name
    return log.name if logs > 1 else of_column if columns > 1 else ""


def _interval(index: int, bins: int) -> str:
    """The part of [0, 1] that a bin of the loss is of: equal parts, as `objectives.flow_loss` has them."""
    return f"[{index / bins:.2g}, {(index + 1) / bins:.2g}]"


def last(values: Sequence[float]) -> float:
    """The last finite one, else NaN."""
    return next((value for value in reversed(values) if math.isfinite(value)), math.nan)
