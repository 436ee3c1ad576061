"""Rows of a run, as in pytest-benchmark's JSON, and bench/RESULTS.md: a table for each processor, versions and date."""

import ast
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
NOTES = "## Where the time goes"
"""Heading of what is written by hand."""
INTRODUCTION = """# Side by side

Medians of interleaved runs in one process, warm, the same weights, after checking that both sides agree; `python -m bench`
measures all rows again, `python -m bench NAME` those of one file. Rows of one table were measured on one processor, with
the same versions, on one day. Spread is the middle half of our times. Trust the ratios, below 1 where this project is
faster. *Products alone*: what the other side's matrix products, convolutions and attention take by themselves, as a share
of its time; no ratio of the same arithmetic can be below it. *Peak*: the most bytes of tensors held at once beyond those
that a call was given, ours / theirs. *Process bytes*: what one process holds at the peak of a step, with its parameters and
moments and the buffers of the backend, ours / theirs; its time is the mean of the processes, and *wall ratio* that of the wall,
which other work on the machine changes. Rows of other processors are in [results](results/intel-xeon.md).
"""  # noqa: E501
AGAINST = ", against "
"""Between the name of a row and that of a further peer."""
COLUMNS = "| what | ours | theirs | ratio | spread | other side | more |\n|---|---|---|---|---|---|---|"


class Row(NamedTuple):
    """Seconds are medians of one call; `spread` is the middle half of our times over their median."""

    name: str
    peer: str
    ours: float
    theirs: float | None
    spread: float
    facts: dict[str, Any]

    @property
    def ratio(self) -> float | None:
        """Our time over theirs: below 1 is faster."""
        return None if self.theirs is None else self.ours / self.theirs


class Setting(NamedTuple):
    """Where rows were measured: "1 thread, processor time, 2026-11-30" and name -> version."""

    processor: str
    measured: str
    versions: dict[str, str]

    @property
    def heading(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"## {self.processor}, {self.measured}\n\n{versions}."


def rows(run: dict[str, Any]) -> list[Row]:
    """The rows of one run."""
    return [row for each in run["benchmarks"] for row in rows_of(each)]


def rows_of(measured: dict[str, Any]) -> list[Row]:
    """The row of what was measured, and one for each peer beside the first: "NAME, against PEER"."""
    facts = dict(measured["extra_info"])
    beside = facts.pop("beside", {})
    shared = {name: facts[name] for name in ("repeat",) if name in facts}
    more = [
        _row({"row": f"{facts['row']}{AGAINST}{peer}", "peer": peer, **shared, **own}, measured["stats"])
        for peer, own in beside.items()
    ]
    return [_row(facts, measured["stats"]), *more]


def _row(facts: dict[str, Any], stats: dict[str, float]) -> Row:
    theirs, repeat = facts.pop("theirs"), facts.pop("repeat", 1)
    if least := facts.pop("least", None):
        facts["products_alone"] = f"{statistics.median(least) / statistics.median(theirs):.2f}"
    return Row(
        facts.pop("row"),
        facts.pop("peer", ""),
        stats["median"] / repeat,
        statistics.median(theirs) if theirs else None,
        stats["iqr"] / stats["median"] if theirs else 0.0,
        facts,
    )


def line(row: Row) -> str:
    """A row of the table."""
    if row.theirs is None:
        times = "| | | | |"
    else:
        times = f"| {_time(row.ours)} | {_time(row.theirs)} | **{row.ratio:.2f}** | {100 * row.spread:.0f} % |"
    return f"| {row.name} {times} {row.peer} | {_facts(row.facts)} |"


def printed(rows: Iterable[Row]) -> str:
    """Rows for a terminal: ours, theirs, their ratio and the other side."""
    cells = [("ours", "theirs", "ratio", "row, other side")]
    for row in rows:
        if row.theirs is None:
            cells.append(("", "", "", f"{row.name}: {_facts(row.facts)}"))
        else:
            name = row.name.split(AGAINST)[0]
            cells.append((_time(row.ours), _time(row.theirs), f"{row.ratio:.2f}", f"{name}, {row.peer}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([*(cell.rjust(width) for cell, width in zip(own[:3], widths[:3], strict=True)), own[3]])
        for own in cells
    )


def updated(page: str, setting: Setting, measured: dict[str, Any]) -> str:
    """bench/RESULTS.md with this row and those of its further peers in the table of its setting, and in no other. What
    stands from `NOTES` on stays as it is."""
    rows, sections = rows_of(measured), read(page)
    _, mark, notes = page.partition(NOTES)
    names = {row.name for row in rows}
    for lines in sections.values():
        lines[:] = [each for each in lines if name_of(each) not in names]
    sections.setdefault(setting.heading, []).extend(map(line, rows))
    tables = ["\n".join([heading, "", COLUMNS, *lines]) for heading, lines in sections.items() if lines]
    return "\n\n".join([INTRODUCTION.strip(), *tables]) + "\n" + (mark and f"\n{mark}{notes}")


def read(page: str) -> dict[str, list[str]]:
    """Heading with versions -> lines of its table."""
    sections: dict[str, list[str]] = {}
    for part in page.partition(NOTES)[0].split("\n## ")[1:]:
        heading, _, table = part.partition("\n| what |")
        sections[f"## {heading.strip()}"] = [each for each in table.splitlines()[2:] if each.startswith("| ")]
    return sections


def name_of(line: str) -> str:
    """The first cell."""
    return line.split(" | ")[0].removeprefix("| ").strip()


class Template(NamedTuple):
    """The name of rows in the code: as written, and what matches those that it makes."""

    label: str
    pattern: re.Pattern[str]


def groups() -> list[str]:
    """Names of the files of rows."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def rows_of_file(path: Path) -> Iterator[Template]:
    """The rows that a file measures, read off its calls of `versus`, `versus.record` and `versus.compare`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("versus", "versus.record", "versus.compare"):
            yield _template(node.args[0])
            if any(keyword.arg == "beside" for keyword in node.keywords):
                yield _template(_plus(node.args[0], AGAINST))


def _plus(name: ast.expr, end: str) -> ast.expr:
    """The name followed by `end` and anything."""
    anything = ast.FormattedValue(ast.Constant(""), -1)
    return ast.JoinedStr([*(name.values if isinstance(name, ast.JoinedStr) else [name]), ast.Constant(end), anything])


def _template(name: ast.expr) -> Template:
    if not isinstance(name, ast.Constant | ast.JoinedStr):
        raise ValueError(f"the name of a row must be written where it is measured: {ast.unparse(name)}")
    parts = name.values if isinstance(name, ast.JoinedStr) else [name]
    texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
    label = "".join("..." if text is None else text for text in texts)
    return Template(label, re.compile("".join(".*" if text is None else re.escape(text) for text in texts)))


def _facts(facts: dict[str, Any]) -> str:
    facts, parts = dict(facts), []
    if (difference := facts.pop("difference", None)) is not None:
        parts.append(f"difference {difference:.0e}")
    peak, their_peak = facts.pop("peak_bytes", None), facts.pop("theirs_peak_bytes", None)
    if peak is not None:
        against = f" / {_bytes(their_peak)}, ratio {peak / their_peak:.2f}" if their_peak else ""
        parts.append(f"peak {_bytes(peak)}{against}")
    first, their_first = facts.pop("first_seconds", None), facts.pop("theirs_first_seconds", None)
    if facts.pop("compiled", False) and first is not None:
        parts.append(f"first call {_time(first)}" + (f" / {_time(their_first)}" if their_first else ""))
    parts += [f"{name.replace('_', ' ')} {value}" for name, value in facts.items()]
    return "; ".join(parts)


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} us"


def _bytes(count: float) -> str:
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
