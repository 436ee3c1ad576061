"""Post-training at equal CPU time: `python -m bench.study --out DIR`, some six CPU minutes a run by rewards.

Makes the runs of `runs.table` one after the other, each on one thread, and measures them at marks of CPU time, which
measuring does not count into. Killed at any moment, the same command goes on: at most a minute of training is lost. A
larger --minutes goes on with finished runs. Writes the rows to --csv and draws tables and plot from them alone
(--draw) into docs/guides/post-training.md; --memory measures peaks of an update instead.
"""

import argparse
import io
import itertools
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import evaluations
from bench.study import memory, page, results, runs, scoring, training
from bench.study.results import Row
from bench.study.scoring import Drawing
from functional_sd3 import weights
from functional_sd3.formats import files
from functional_sd3.training.recorder import DivergedError
from functional_sd3.weights import Model, shipped

GUIDES = Path(__file__).resolve().parents[2] / "docs" / "guides"
ALL_CAPTIONS = 1000
"""More captions of one thing than there are."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of the study; 130 where a signal stopped it."""
    parser = argparse.ArgumentParser(prog="python -m bench.study", description="Study of post-training.")
    parser.add_argument("--out", type=Path, default=Path("out/study"), help="folder of the runs")
    parser.add_argument("--params", type=Path, help="folder of the model to start from (default: the shipped one)")
    parser.add_argument("--csv", type=Path, default=GUIDES / "post-training.csv", help="file of the rows")
    parser.add_argument("--page", type=Path, default=GUIDES / "post-training.md", help="page of tables and plot")
    parser.add_argument("--run", action="append", default=[], metavar="NAME", help="a run to make (default: all)")
    parser.add_argument("--seeds", type=int, default=len(runs.SEEDS), help="of each run (default 3)")
    parser.add_argument("--minutes", type=float, default=4.0, help="CPU minutes of a run by rewards (default 4)")
    parser.add_argument("--captions", type=int, default=200, help="of two things, at every mark (default 200)")
    parser.add_argument("--draw", action="store_true", help="only draw tables and plot from the rows")
    parser.add_argument("--memory", action="store_true", help="only measure the peaks of an update")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = parsed.params or shipped.folder()
    if parsed.memory:
        for name, words in memory.commands().items():
            memory.add(_peaks(parsed.csv), peak := memory.measure(name, words, start))
            print(peak, flush=True)
    elif not parsed.draw:
        chosen = runs.chosen(runs.table(parsed.minutes), parsed.run, parsed.seeds)
        if not study(chosen, start, parsed.out, parsed.csv, captions=parsed.captions):
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 130
    if parsed.page.exists() and (rows := results.read(parsed.csv)):
        draw(parsed.page, rows, memory.read(_peaks(parsed.csv)))
    return 0


def study(chosen: Sequence[runs.Run], start: Path, out: Path, path: Path, *, captions: int, unit: float = 60.0) -> bool:
    """Make the runs that are not done, in order, and add their rows; false where a signal stopped one.

    `unit`: CPU seconds of a minute of the table, fewer in tests. A method that this version lacks, and a run whose
    start failed, are passed over with a note.
    """
    _measure_start(start, path, captions)
    for run in chosen:
        base = None if run.start is None else next(each for each in runs.table() if _is_start(each, run))
        folder, source = out / run.folder, start if base is None else out / base.folder
        if not runs.is_known(run) or not (source / "model_index.json").exists():
            print(f"{run.name}, seed {run.seed}: passed over, as its method or its start is missing", flush=True)
            continue
        if _is_done(results.read(path), run):
            continue
        print(f"{run.name}, seed {run.seed}", flush=True)
        try:
            if not _make(run, source, folder, path, captions, unit):
                return False
        except DivergedError as error:
            results.add(path, Row(run.name, run.seed, run.minutes, 0.0, 0, note=f"diverged: {error}"))
    return True


def marks(minutes: float) -> list[float]:
    """Minutes at which a run is measured: 1, 2, 4, 6, ... up to the last, which is one of them."""
    regular = itertools.takewhile(lambda mark: mark < minutes, itertools.chain([1.0], itertools.count(2.0, 2.0)))
    return [*regular, minutes]


def draw(path: Path, rows: Sequence[Row], peaks: Sequence[memory.Peak]) -> None:
    """Write the tables between the marks of the page, and the plot beside it."""
    buffer = io.BytesIO()
    page.image(rows).save(buffer, format="PNG", optimize=True)
    files.write_atomic(path.with_suffix(".png"), buffer.getvalue())
    text = evaluations.with_section(path.read_text(encoding="utf-8"), f"\n{page.tables(rows, peaks)}\n", "study")
    files.write_atomic(path, text.encode())


def _make(run: runs.Run, source: Path, folder: Path, path: Path, captions: int, unit: float) -> bool:
    words = [*run.words.split(), "--seed", str(run.seed), "--device", "cpu"]
    setup = training.prepare([*words, "--params", str(source), "--out", str(folder), "--resume"])

    def on_mark(mark: float, spent: float, updates: int, state: Any) -> None:
        minutes = mark / unit
        row = Row(run.name, run.seed, minutes, spent, updates, command=run.words)
        _measure(setup.task.model(state), row, _drawings(run, captions, minutes == run.minutes), path)

    return training.advance(setup, folder, [unit * mark for mark in marks(run.minutes)], on_mark)


def _measure_start(start: Path, path: Path, captions: int) -> None:
    model = weights.load(start, dtype=torch.float32)
    alone = [Drawing(2, steps, 1.0, captions) for steps in (runs.REWARD_STEPS, *runs.STUDENT_STEPS)]
    _measure(model, Row("start", 0, 0.0, 0.0, 0), [*alone, *_final(captions)], path)


def _measure(model: Model, row: Row, drawings: Sequence[Drawing], path: Path) -> None:
    """Add a row for each way of drawing that has none yet."""
    for drawing in drawings:
        own = row._replace(things=drawing.things, steps=drawing.steps, cfg=drawing.cfg, processor=processor())
        if own.of not in {each.of for each in results.read(path)}:
            results.add(path, own := own._replace(**scoring.scores(model, drawing)))
            print(f"  {own.minutes:g} min, {own.updates} updates, {own.steps} steps: {own.right}", flush=True)


def _drawings(run: runs.Run, captions: int, is_last: bool) -> list[Drawing]:
    drawings = [Drawing(2, steps, 1.0, captions) for steps in run.steps]
    return [*drawings, *_final(captions)] if is_last and runs.REWARD_STEPS in run.steps else drawings


def _final(captions: int) -> list[Drawing]:
    """At the end: the default settings, and captions of one thing."""
    return [Drawing(1, runs.REWARD_STEPS, 1.0, ALL_CAPTIONS), Drawing(2, 28, 5.0, max(captions // 2, 1))]


def _is_start(each: runs.Run, of: runs.Run) -> bool:
    return (each.name, each.seed) == (of.start, of.seed)


def _is_done(rows: Sequence[Row], run: runs.Run) -> bool:
    """Whether its last measurement is there."""
    drawing = _drawings(run, 1, True)[-1]
    wanted = run.name, run.seed, run.minutes, drawing.things, drawing.steps, drawing.cfg
    failed = any((row.run, row.seed) == (run.name, run.seed) and row.note for row in rows)
    return failed or wanted in {row.of for row in rows}


def _peaks(path: Path) -> Path:
    """The file of the peaks beside that of the rows."""
    return path.with_name(f"{path.stem}-memory.csv")


def processor() -> str:
    """Name of the processor and the instruction sets that decide how fast bfloat16 is."""
    information = Path("/proc/cpuinfo")
    text = information.read_text(errors="replace") if information.exists() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    sets = [each for each in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{each}\b", text)]
    return f"{name[1] if name else platform.machine()} ({sets[-1]})" if sets else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
