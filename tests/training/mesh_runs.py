"""Runs of training commands in the processes of a test, and their checkpoints."""

import contextlib
import io
import os
from pathlib import Path

import pytest

from functional_sd3.training import checkpoint, stored

STEPS = ["--data", "shapes", "--pictures", "12", "--steps", "6", "--batch-size", "4", "--save-every", "3"]
SMALL = [*STEPS, "--log-every", "2", "--sample-every", "0", "--warmup", "2", "--lr", "1e-2"]


REWARD = ["--steps", "2", "--batch-size", "8", "--group", "2", "--sampling-steps", "2", "--draws", "1"]
REWARD += ["--save-every", "1", "--sample-every", "0", "--lr", "1e-2", "--warmup", "1"]


def train(folder, *words, fault=None, command="train"):
    """Exit status, standard output and standard error of the command in this process."""
    from functional_sd3 import cli

    common = REWARD if command == "reward" else SMALL
    words = [command, "--params", str(folder), *common, *map(str, words)]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        # As torchrun does.
        if "RANK" in os.environ:
            patch.setenv("LOCAL_RANK", os.environ["RANK"])
        if fault is not None:
            fault(patch)
        status = cli.main(words)
    return status, out.getvalue(), err.getvalue()


def tensors(out, step=6):
    """The leaves of a checkpoint of any number of processes."""
    (path,) = (path for path in checkpoint.paths(Path(out) / "checkpoints") if checkpoint.step_of(path) == step)
    opened = stored.open_stored(path)
    return {name: stored.read(opened, name) for name in opened.leaves}


def result(out):
    """Bytes of the files of a written transformer."""
    return {path.name: path.read_bytes() for path in (Path(out) / "transformer").iterdir()}


def error(ours, theirs, kind="params."):
    """Relative difference of all leaves of a kind together; averages are parameters too."""
    assert ours.keys() == theirs.keys()
    kinds = (kind, "ema.") if kind == "params." else (kind,)
    pairs = [(ours[name].double(), theirs[name].double()) for name in ours if any(each in name for each in kinds)]
    assert pairs
    return float((sum((x - y).square().sum() for x, y in pairs) / sum(y.square().sum() for _, y in pairs)).sqrt())
