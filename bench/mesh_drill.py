"""The drill of docs/guides/scale.md: one of four processes is killed twice, and the run stays that of one.

    python -m bench.mesh_drill [--steps 200] [--mesh data=4] [--work DIR]

torchrun trains the transformer of params/tiny on shapes with --max-restarts 2, one process is ended by SIGKILL twice,
and nobody does anything: the run goes on from its last checkpoint each time. At nine tenths it is stopped, and one
process goes on with it to the end. The result is compared with that of one undisturbed process that takes each
batch in four parts.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from functional_sd3.parallel import mesh as meshes
from functional_sd3.training import checkpoint, stored

KILLED_AFTER = (0.3, 0.7)
"""Shares of the steps after which one process is killed."""
STOPPED_AFTER = 0.9
"""The share after which one process goes on."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--mesh", default="data=4")
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="drill-"))
    count = 1
    for size in meshes.parse(arguments.mesh).values():
        count *= size
    started = time.monotonic()

    def log(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)

    words = ["train", "--data", "shapes", "--pictures", "64", "--batch-size", "4", "--steps", str(arguments.steps)]
    words += ["--save-every", "10", "--log-every", "10", "--sample-every", "0", "--lr", "1e-4"]
    disturbed, alone = work / "disturbed", work / "alone"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
    launch += ["--max-restarts", str(len(KILLED_AFTER)), "-m", "functional_sd3", *words]
    log(f"{count} processes started, --mesh {arguments.mesh}, --max-restarts {len(KILLED_AFTER)}")
    command = [*launch, "--mesh", arguments.mesh, "--out", str(disturbed)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        reader = threading.Thread(target=report, args=(run, log))
        reader.start()
        for share in KILLED_AFTER:
            wait_for(disturbed / "checkpoints", int(share * arguments.steps), run)
            newest_step = newest(disturbed / "checkpoints")
            os.kill(workers(run.pid)[1], signal.SIGKILL)
            log(f"a process is killed (kill -9), after the checkpoint of step {newest_step}")
            wait_for(disturbed / "checkpoints", newest_step + 1, run)
        wait_for(disturbed / "checkpoints", int(STOPPED_AFTER * arguments.steps), run)
        log("torchrun is stopped (SIGTERM)")
        run.send_signal(signal.SIGTERM)
        reader.join()
    log(f"ended, status {run.returncode}; one process goes on, --accumulate {count} --resume")
    command = [sys.executable, "-m", "functional_sd3", *words, "--accumulate", str(count), "--out", str(disturbed)]
    with subprocess.Popen([*command, "--resume"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        report(run, log)
    log(f"done, status {run.returncode}")
    command = [sys.executable, "-m", "functional_sd3", *words, "--accumulate", str(count), "--out", str(alone)]
    subprocess.run(command, check=True, capture_output=True)
    log(f"one process, undisturbed, --accumulate {count}: done")
    error, equal, leaves = difference(disturbed, alone)
    log(f"parameters differ by at most {error:.1e}, relative to a leaf; {equal} of {leaves} leaves have the same bits")
    return int(not error < 1e-5)


def report(run: subprocess.Popen, log: Callable[[str], None]) -> None:
    """Log the lines of a run that say how it goes on, until it ends."""
    assert run.stderr is not None
    for line in run.stderr:
        if line.startswith(("resuming", "started again", "stopped", "functional-sd3", "note: mesh", "process ")):
            log("  " + line.rstrip())


def newest(folder: Path) -> int:
    return max(map(checkpoint.step_of, checkpoint.paths(folder)), default=0)


def wait_for(folder: Path, step: int, run: subprocess.Popen) -> None:
    while newest(folder) < step:
        if run.poll() is not None:
            raise RuntimeError(f"the run ended before step {step}")
        time.sleep(0.05)


def workers(pid: int) -> list[int]:
    """The child processes of `pid`."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    return sorted(child for child, parent in parents.items() if parent == pid)


def difference(ours: Path, theirs: Path) -> tuple[float, int, int]:
    """Largest relative difference of a leaf's parameters, leaves of the state that are equal, all leaves."""
    states = []
    for out in (ours, theirs):
        opened = stored.open_stored(checkpoint.paths(out / "checkpoints")[-1])
        states.append({name: stored.read(opened, name) for name in opened.leaves})
    first, second = states
    errors = [
        float((first[name] - second[name]).norm() / second[name].norm().clamp_min(1e-12))
        for name in first
        if name.startswith("params.")
    ]
    return max(errors), sum(bool(first[name].equal(second[name])) for name in first), len(first)


if __name__ == "__main__":
    sys.exit(main())
