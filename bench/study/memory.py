"""Memory of an update of each method against that of a plain training step of as many images."""

import csv
import io
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench import timing
from bench.study import training
from bench.study.runs import METHODS, STUDENTS
from functional_sd3.core import tree
from functional_sd3.formats import files

BATCH = 64
PLAIN = "plain step"
MIB = 2**20


class Peak(NamedTuple):
    """MiB of the state of a run (parameters, moments, average and slow copy), and of what an update holds at most
    beside it, rollout included."""

    name: str
    state: float
    update: float


def commands(batch: int = BATCH) -> dict[str, str]:
    """Command lines by the name of what they train with, all at the same number of images an update."""
    images = f"--pictures {batch}"
    rewarded = {name: f"reward --reward shapes --draws 1 {words}" for name, words in METHODS.items()}
    distilled = {name: f"distill --to 4 {images} --method {method}" for name, method in STUDENTS.items()}
    named = {PLAIN: f"train --data shapes {images}", **rewarded, **distilled}
    return {name: f"{words} --batch-size {batch}" for name, words in named.items()}


def measure(name: str, words: str, start: Path) -> Peak:
    """The peak of the first update of a command's run from the model in the folder `start`."""
    with tempfile.TemporaryDirectory() as folder:
        task = training.prepare([*words.split(), "--params", str(start), "--out", folder, "--device", "cpu"]).task
        held = sum(leaf.nbytes for leaf in tree.leaves(task.state))
        peak = timing.allocated_peak(lambda: task.train_step(task.state, training.next_batch(task, task.state, 0)))
    return Peak(name, held / MIB, peak / MIB)


def read(path: Path) -> list[Peak]:
    """The rows of a file; none where there is no file."""
    if not path.exists():
        return []
    _, *lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
    return [Peak(name, float(state), float(update)) for name, state, update in lines]


def add(path: Path, peak: Peak) -> None:
    """Add a row, in place of one of that name."""
    text = io.StringIO()
    rows = [*(each for each in read(path) if each.name != peak.name), peak]
    lines = [[row.name, f"{row.state:.1f}", f"{row.update:.1f}"] for row in rows]
    csv.writer(text, lineterminator="\n").writerows([Peak._fields, *lines])
    files.write_atomic(path, text.getvalue().encode())
