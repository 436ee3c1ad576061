"""A run that is stopped, killed or meets a full disk keeps its state and is resumed bit for bit."""

import errno
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from functional_sd3.core import tree
from functional_sd3.formats import files
from functional_sd3.training import checkpoint, interruption, log, loop, recorder
from functional_sd3.weights import WeightsError
from tests.training import interrupted

PACKAGE = Path(interrupted.__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The last state of the run that nothing hinders."""
    return interrupted.train(tmp_path_factory.mktemp("whole")).state


def interrupt(number=signal.SIGINT):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def hangups_are_not_ignored():
    """A suite started with nohup ignores SIGHUP, and so would the runs."""
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def newest_step(out):
    return checkpoint.step_of(checkpoint.paths(out / "checkpoints")[-1])


def test_runs_killed_at_random_moments_go_on_to_the_same_bits(tmp_path, whole):
    command = [sys.executable, interrupted.__file__, str(tmp_path), "moments", "7", "8"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert child.returncode == 0, child.stderr
    left = []
    for index in range(8):
        actual = checkpoint.paths(tmp_path / str(index) / "checkpoints")
        left.append(checkpoint.step_of(actual[-1]) if actual else 0)
        assert not tree.diff(interrupted.train(tmp_path / str(index)).state, whole)
    assert len(set(left)) > 1, left


# Each is called when the step of that number is done, or before it.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["batch", "step", "row", "checkpoint", "sample", "last step", "last sample"])
def test_a_signal_at_any_moment_ends_the_run_after_the_state_is_saved(tmp_path, whole, monkeypatch, moment, number):
    plain_step, batch = interrupted.setting()[1:]
    # A step at which the run saves anyway shows nothing of a signal during its sample.
    at = interrupted.STEPS if moment.startswith("last") else 10 if moment == "checkpoint" else 8
    original = checkpoint.save

    def batch_of_step(step):
        if moment == "batch" and step == at:
            interrupt(number)
        return batch(step)

    def train_step(state, given):
        if moment.endswith("step") and int(state.step) + 1 == at:
            interrupt(number)
        return plain_step(state, given)

    def save(folder, step, *rest, **options):
        if moment == "checkpoint" and step == at:
            interrupt(number)
        return original(folder, step, *rest, **options)

    def on_sample(state, done):
        if moment.endswith("sample") and done == at:
            interrupt(number)
            raise AssertionError("a sample goes on after the signal")

    monkeypatch.setattr(checkpoint, "save", save)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    outcome = interrupted.train(
        tmp_path, train_step, batch_of_step, sample_every=2, on_sample=on_sample,
        on_row=lambda step, row: interrupt(number) if moment == "row" and step == at else None,
    )  # fmt: skip
    assert outcome.reason == "interrupted"
    assert newest_step(tmp_path) == int(outcome.state.step) == at + (moment == "batch")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    moment = None
    assert not tree.diff(interrupted.train(tmp_path).state, whole)


def test_a_second_ctrl_c_is_patient_and_a_third_is_not(tmp_path, capfd):
    plain_step = interrupted.setting()[1]

    def impatient(count):
        def train_step(state, batch):
            if int(state.step) == 7:
                for _ in range(count):
                    interrupt()
            return plain_step(state, batch)

        return train_step

    outcome = interrupted.train(tmp_path / "two", impatient(2))
    assert outcome.reason == "interrupted" and newest_step(tmp_path / "two") == 8
    assert "Ctrl-C once more stops without saving" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        interrupted.train(tmp_path / "three", impatient(3))
    assert newest_step(tmp_path / "three") == 5


def test_a_scheduler_may_terminate_as_often_as_it_likes():
    with interruption.catch() as stop:
        for _ in range(5):
            interrupt(signal.SIGTERM)
        assert stop.is_requested()


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruption.catch() as stop:
            interrupt(signal.SIGHUP)
            assert not stop.is_requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_sample_that_fails_is_noted_and_the_run_goes_on(tmp_path, whole):
    notes = []

    def on_sample(state, done):
        raise WeightsError("samples/4.png: cannot be written: no space left on device")

    outcome = interrupted.train(tmp_path, on_sample=on_sample, sample_every=4, note=notes.append)
    assert outcome.reason == "done" and not tree.diff(outcome.state, whole)
    assert len(notes) == 6 and "no sample of step 4: samples/4.png: cannot be written" in notes[0]


def test_a_sample_missed_is_drawn_when_the_run_goes_on(tmp_path):
    drawn = []

    def on_sample(state, done):
        if done == 8 and 8 not in drawn:
            drawn.append(8)
            interrupt()
        drawn.append(done)

    options = {"sample_every": 4, "on_sample": on_sample}
    assert interrupted.train(tmp_path, **options).reason == "interrupted"
    interrupted.train(tmp_path, has_sample=lambda step: step != 8, **options)
    assert drawn == [4, 8, 8, 12, 16, 20, 23]


def test_a_batch_that_cannot_be_read_ends_the_run_after_it_is_saved(tmp_path, whole):
    batch = interrupted.setting()[2]

    def batch_of_step(step):
        if step == 13:
            raise ValueError("7.png: vanished")
        return batch(step)

    with pytest.raises(ValueError, match="7.png: vanished"):
        interrupted.train(tmp_path, batch_of_step=batch_of_step)
    assert newest_step(tmp_path) == 13
    assert not tree.diff(interrupted.train(tmp_path).state, whole)


def full_disk(monkeypatch, is_full):
    """Every write of a checkpoint's step fails as on a full disk where `is_full(step, checkpoints there)`."""
    original = files.write_atomic

    def write_atomic(path, content, **options):
        if Path(path).name.startswith("step-"):
            there = checkpoint.paths(Path(path).parent)
            if is_full(checkpoint.step_of(Path(path)), there):
                raise WeightsError(f"{path}: cannot be written: no space left") from OSError(errno.ENOSPC, "no space")
        return original(path, content, **options)

    monkeypatch.setattr(files, "write_atomic", write_atomic)


def test_a_full_disk_costs_a_checkpoint_and_no_step(tmp_path, whole, monkeypatch):
    notes = []
    full_disk(monkeypatch, lambda step, there: step == 10)
    outcome = interrupted.train(tmp_path, note=notes.append)
    assert not tree.diff(outcome.state, whole)
    assert len(notes) == 1
    assert "the checkpoint of step 10 could not be written, the newest one is step-00000005" in notes[0]
    assert newest_step(tmp_path) == 23


def test_old_checkpoints_make_room_for_the_last_one(tmp_path, whole, monkeypatch):
    full_disk(monkeypatch, lambda step, there: step == 23 and len(there) > 1)
    outcome = interrupted.train(tmp_path, note=pytest.fail)
    assert not tree.diff(outcome.state, whole)
    assert [checkpoint.step_of(path) for path in checkpoint.paths(tmp_path / "checkpoints")] == [20, 23]


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_with_the_state(tmp_path, whole, monkeypatch):
    full_disk(monkeypatch, lambda step, there: step == 23)
    match = "of step 23 could not be written, the newest one is step-00000020"
    with pytest.raises(loop.UnsavedError, match=match) as caught:
        interrupted.train(tmp_path)
    assert not tree.diff(caught.value.state, whole)
    assert newest_step(tmp_path) == 20


def test_a_log_that_cannot_be_written_is_noted_and_keeps_whole_rows(tmp_path, monkeypatch):
    path, notes = tmp_path / "log.csv", []
    append = log.append

    def failing(table, step, *rest, **options):
        if step == 6:
            raise WeightsError(f"{path}: cannot be written: no space left")
        return append(table, step, *rest, **options)

    monkeypatch.setattr(log, "append", failing)
    interrupted.train(tmp_path, note=notes.append)
    assert len(notes) == 1 and "the row of step 6 is not in the log" in notes[0]
    assert "6" not in [row["step"] for row in log.read(path)]


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    plain_step = interrupted.setting()[1]

    # The loss and the gradient of a step are those before its update.
    def overflowing(state, batch):
        state, metrics = plain_step(state, batch)
        if int(state.step) == 15:
            state.params["in"][0, 0] = math.inf
        return state, metrics

    with pytest.raises(loop.DivergedError, match="params.in holds an infinity at step 15.*step-00000010.safetensors"):
        interrupted.train(tmp_path, overflowing)
    assert newest_step(tmp_path) == 10


def test_the_first_step_that_is_not_finite_is_named(tmp_path):
    plain_step = interrupted.setting()[1]

    def failing(state, batch):
        state, metrics = plain_step(state, batch)
        return state, {**metrics, "grad_norm": torch.tensor(math.nan if int(state.step) >= 12 else 1.0)}

    with pytest.raises(recorder.DivergedError, match="grad_norm is nan at step 12.*step-00000010"):
        interrupted.train(tmp_path, failing, log_every=100)


def test_at_least_two_checkpoints_are_kept(tmp_path):
    interrupted.train(tmp_path, keep=1)
    assert [checkpoint.step_of(path) for path in checkpoint.paths(tmp_path / "checkpoints")] == [20, 23]
