"""The drill of docs/guides/scale.md: one of four processes is killed twice, and the run stays that of one.

    python -m bench.mesh_drill [--steps 200] [--mesh data=4] [--work DIR]

Trains the transformer of params/tiny on shapes with torchrun, ends one process by SIGKILL twice, goes on with --resume
each time, and compares the last checkpoint with that of one undisturbed process that takes each batch in four parts.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from functional_sd3.formats import files
from functional_sd3.parallel import mesh as meshes
from functional_sd3.training import checkpoint

KILLED_AFTER = (0.3, 0.7)
"""Shares of the steps after which one process is killed."""


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
    launch += ["-m", "functional_sd3", *words, "--mesh", arguments.mesh, "--out", str(disturbed)]
    resume: list[str] = []
    for share in (*KILLED_AFTER, None):
        run = subprocess.Popen([*launch, *resume], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        log(f"{count} processes started, --mesh {arguments.mesh} {' '.join(resume)}")
        if share is not None:
            wait_for(disturbed / "checkpoints", int(share * arguments.steps), run)
            victim = workers(run.pid)[1]
            os.kill(victim, signal.SIGKILL)
            killed = time.monotonic()
            log(f"a process is killed (kill -9), after the checkpoint of step {newest(disturbed / 'checkpoints')}")
        _, errors = run.communicate()
        resume = ["--resume"]
        if share is None:
            log(f"done, status {run.returncode}")
        else:
            log(f"the others ended {time.monotonic() - killed:.1f} s later, status {run.returncode}")
        for line in errors.splitlines():
            if line.startswith(("resuming", "functional-sd3")):
                log("  " + line)
    command = [sys.executable, "-m", "functional_sd3", *words, "--accumulate", "4", "--out", str(alone)]
    subprocess.run(command, check=True, capture_output=True)
    log("one process, undisturbed, --accumulate 4: done")
    error, equal, leaves = difference(disturbed, alone)
    log(f"parameters differ by at most {error:.1e}, relative to a leaf; {equal} of {leaves} leaves have the same bits")
    return int(not error < 1e-5)


def newest(folder: Path) -> int:
    return max(map(checkpoint.step_of, checkpoint.paths(folder)), default=0)


def wait_for(folder: Path, step: int, run: subprocess.Popen) -> None:
    while newest(folder) < step:
        if run.poll() is not None:
            raise RuntimeError(f"the run ended before step {step}: {run.communicate()[1]}")
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
        mapped = files.open_mapped(checkpoint.paths(out / "checkpoints")[-1])
        states.append({name: files.tensor(mapped, name) for name in mapped.header.tensors})
    first, second = states
    errors = [
        float((first[name] - second[name]).norm() / second[name].norm().clamp_min(1e-12))
        for name in first
        if name.startswith("params.")
    ]
    return max(errors), sum(bool(first[name].equal(second[name])) for name in first), len(first)


if __name__ == "__main__":
    sys.exit(main())
