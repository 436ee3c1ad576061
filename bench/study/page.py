"""Tables and plot of the study, from its rows alone."""

from collections.abc import Callable, Iterable, Sequence

from PIL import Image

from bench import plot
from bench.study import memory, runs
from bench.study.memory import PLAIN, Peak
from bench.study.results import Row

START = "start"
STUDENTS = [run.name for run in runs.table() if run.kind == runs.DISTILLED and run.seed == 0]
AFTER = "NFT after segments"
Value = Callable[[Row], float | None]


def tables(rows: Sequence[Row], peaks: Sequence[Peak] = ()) -> str:
    """Markdown: by rewards, by the proxy, few steps, memory, options; tables of which nothing was run are left out."""
    parts = [_conditions(rows), _rewarded(rows), _proxies(rows), _students(rows), _memory(peaks), _options(rows)]
    return "\n\n".join(part for part in parts if part)


def image(rows: Sequence[Row]) -> Image.Image:
    """Shares of right images against CPU minutes, by the true reward and by the proxy, and against steps.

    Lines are means over seeds. Raises ValueError where there is nothing to draw.
    """
    titles = {"rewarded for right images": _lines(rows, ""), "rewarded for colours alone": _lines(rows, " by colours")}
    students = {name: _against_steps(rows, name) for name in (START, *STUDENTS, AFTER)}
    parts = []
    if titles := {title: lines for title, lines in titles.items() if lines}:
        parts.append(plot.panels(titles, "CPU minutes", "% right", linear=True))
    if students := {name: points for name, points in students.items() if points}:
        parts.append(plot.panels({"few steps": students}, "steps", "% right", linear=True))
    if not parts:
        raise ValueError("no points to draw")
    whole = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    for index, part in enumerate(parts):
        whole.paste(part.convert("RGB"), (0, sum(above.height for above in parts[:index])))
    return whole.quantize(128, dither=Image.Dither.NONE)


def _right(row: Row) -> float | None:
    return None if row.right is None else 100 * row.right


def _outlines(row: Row) -> float | None:
    return None if row.outlines is None else 100 * row.outlines


def _lines(rows: Sequence[Row], ending: str) -> dict[str, list[tuple[float, float]]]:
    """Curves of the methods of rewards against CPU minutes, from the start on, of runs whose names end so."""
    start = _mean(_select(rows, START, steps=runs.REWARD_STEPS), _right)
    lines = {}
    for method in runs.METHODS:
        own = _select(rows, method + ending, steps=runs.REWARD_STEPS)
        points = [(mark, _mean([row for row in own if row.minutes == mark], _right)) for mark in _marks(own)]
        if points:
            lines[method] = [(x, y) for x, y in [(0.0, start), *points] if y is not None]
    return lines


def _against_steps(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    last = _last(_select(rows, name))
    points = [(float(steps), _mean([row for row in last if row.steps == steps], _right)) for steps in (1, 2, 4)]
    return [(x, y) for x, y in points if y is not None]


def _select(
    rows: Iterable[Row], name: str, *, things: int = 2, steps: int | None = None, cfg: float = 1.0
) -> list[Row]:
    """Measurements of a run's models, of all seeds."""
    return [
        row for row in rows
        if row.run == name and row.things == things and row.cfg == cfg and steps in (None, row.steps)
    ]  # fmt: skip


def _last(rows: Sequence[Row]) -> list[Row]:
    """Those at the last mark that all their seeds reached, so that seeds are compared after equal time."""
    marks = [set(_marks([row for row in rows if row.seed == seed])) for seed in {row.seed for row in rows}]
    common = set.intersection(*marks) if marks else set()
    return [row for row in rows if common and row.minutes == max(common)]


def _marks(rows: Iterable[Row]) -> list[float]:
    return sorted({row.minutes for row in rows})


def _mean(rows: Iterable[Row], value: Value) -> float | None:
    values = [number for row in rows if (number := value(row)) is not None]
    return sum(values) / len(values) if values else None


def _cell(rows: Iterable[Row], value: Value, digits: int = 1) -> str:
    """The mean over seeds, and where they differ the lowest and the highest."""
    values = [number for row in rows if (number := value(row)) is not None]
    if not values:
        return ""
    mean, low, high = (f"{each:.{digits}f}" for each in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def _seeds(rows: Iterable[Row]) -> str:
    return str(len({row.seed for row in rows}))


def _conditions(rows: Sequence[Row]) -> str:
    processors = ", ".join(sorted({row.processor for row in rows if row.processor}))
    images = max((row.images for row in _select(rows, START)), default=0)
    noted = [f"{row.run}, seed {row.seed}: {row.note}." for row in rows if row.note]
    made = {(row.run, row.seed) for row in rows if row.run != START}
    lines = [
        f"Begun or done: {len(made)} of {len(runs.table())} runs. Tables of which nothing was run are left out.",
        f"Shares in percent of images of {images} held-out two-object captions, one noise each, the same for all;",
        "means over seeds, of several also the lowest and the highest. One thread; processor: " + processors + ".",
        *noted,
    ]
    return "\n".join(lines)


def _rewarded(rows: Sequence[Row]) -> str:
    drawn = {name: _select(rows, name, steps=runs.REWARD_STEPS) for name in (START, *runs.METHODS)}
    marks = _marks(row for own in drawn.values() for row in own)
    lines = []
    for name, own in drawn.items():
        if not own:
            continue
        last = _last(own)
        one, default = (_last(_select(rows, name, **drawing)) for drawing in ({"things": 1}, {"steps": 28, "cfg": 5.0}))
        accuracies = [_cell([row for row in own if row.minutes == mark], _right) for mark in marks]
        spreads = [_cell(last, lambda row: row.place, 2), _cell(last, lambda row: row.side, 2)]
        ends = [_cell(last, _outlines), _cell(default, _right), _cell(one, _right), *spreads]
        lines.append([name, _seeds(own), _cell(last, lambda row: row.updates, 0), *accuracies, *ends])
    times = [f"{mark:g} min" for mark in marks]
    head = ["method", "seeds", "updates", *times, "second reader", "28 steps, guided", "one object", "places", "sides"]
    return f"### By rewards\n\n{_markdown(head, lines)}" if lines else ""


def _proxies(rows: Sequence[Row]) -> str:
    lines = []
    for method in (START, *runs.PROXIES):
        own = _last(_select(rows, method if method == START else f"{method} by colours", steps=runs.REWARD_STEPS))
        if own:
            minutes = f"{own[0].minutes:g}"
            proxy = _cell(own, lambda row: None if row.colours is None else 100 * row.colours, 2)
            places = _cell(own, lambda row: row.place, 2)
            lines.append([method, _seeds(own), minutes, proxy, _cell(own, _right), _cell(own, _outlines), places])
    head = ["method", "seeds", "minutes", "colours", "right", "second reader", "places"]
    return f"### By a proxy, colours alone\n\n{_markdown(head, lines)}" if len(lines) > 1 else ""


def _students(rows: Sequence[Row]) -> str:
    lines = []
    for name in (START, *STUDENTS, AFTER):
        last = _last(_select(rows, name))
        if last:
            cells = [_cell([row for row in last if row.steps == steps], _right) for steps in runs.STUDENT_STEPS]
            lines.append([name, _seeds(last), f"{last[0].minutes:g}", _cell(last, lambda row: row.updates, 0), *cells])
    head = ["student", "seeds", "minutes", "updates", *(f"{steps} steps" for steps in runs.STUDENT_STEPS)]
    return f"### Few steps\n\n{_markdown(head, lines)}" if lines else ""


def _memory(peaks: Sequence[Peak]) -> str:
    plain = next((peak for peak in peaks if peak.name == PLAIN), None)
    if plain is None:
        return ""
    order = list(memory.commands())
    lines = [
        [peak.name, f"{peak.state:.0f}", f"{peak.update:.0f}", f"{peak.update / plain.update:.2f}"]
        for peak in sorted(peaks, key=lambda peak: order.index(peak.name))
    ]
    return f"### Memory\n\n{_markdown(['', 'state, MiB', 'update, MiB', 'of a plain step'], lines)}"


def _options(rows: Sequence[Row]) -> str:
    commands = {row.run: row.command for row in rows if row.command}
    lines = [[name, words.split()[0], f"`{' '.join(words.split()[1:])}`"] for name, words in commands.items()]
    return f"### Options\n\n{_markdown(['run', 'command', 'options'], lines)}" if lines else ""
