"""A run that torchrun starts again goes on by itself; another's run is not gone on with."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from functional_sd3.cli import restarts
from tests.training import mesh_runs


def test_torchrun_goes_on_after_a_process_was_killed(model_folder, tmp_path):
    out, alone = tmp_path / "run", tmp_path / "alone"
    assert mesh_runs.train(model_folder, "--out", alone, "--accumulate", "2")[0] == 0
    script = Path(__file__).with_name("restarted.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    words = ["train", "--params", str(model_folder), *mesh_runs.SMALL, "--out", str(out), "--mesh", "data=2"]
    done = subprocess.run(
        [*launcher, "--max-restarts", "1", str(script), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lost = r"process 1 was lost \(killed, or its machine is gone\); the others end at step [34]; --resume goes on from "
    assert re.search(lost + "the newest checkpoint, .*/step-00000003\n", done.stderr), done.stderr
    assert "started again by torchrun\n" in done.stderr and "resuming at step 3 of 6\n" in done.stderr
    ours, theirs = mesh_runs.tensors(out), mesh_runs.tensors(alone)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert mesh_runs.result(out) == mesh_runs.result(alone) and not (out / restarts.NAME).exists()


@pytest.mark.parametrize("name", ["4f1c", "none"])
def test_a_restart_goes_on_with_the_run_of_its_own_torchrun_alone(tmp_path, monkeypatch, name):
    assert not restarts.is_restart(tmp_path)
    restarts.begin(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    # The first start was refused: the folder holds another run.
    assert not restarts.is_restart(tmp_path)
    restarts.begin(tmp_path)
    assert restarts.is_restart(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not restarts.is_restart(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    if name == "none":
        monkeypatch.setattr(restarts.os, "getppid", lambda: 1)
    else:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    assert not restarts.is_restart(tmp_path)
    restarts.end(tmp_path)
    assert not list(tmp_path.iterdir())
