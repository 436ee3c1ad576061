import importlib.util
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import functional_sd3
from functional_sd3.core import prng, tree
from functional_sd3.training import checkpoint, log, loop
from functional_sd3.weights import WeightsError

CHILD = Path(__file__).with_name("interrupted.py")
PACKAGE = Path(functional_sd3.__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("interrupted", CHILD)
interrupted = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(interrupted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupts: its folder and its last state."""
    out = tmp_path_factory.mktemp("whole")
    return out, interrupted.train(out).state


def rows_without_time(out):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in log.read(out / "log.csv")]


# During a step after the last checkpoint; while a checkpoint is being written; before there is any.
@pytest.mark.parametrize(("when", "number", "left"), [("step", 13, 10), ("write", 15, 10), ("step", 3, 0)])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, whole, when, number, left):
    command = [sys.executable, str(CHILD), str(tmp_path), when, str(number)]
    child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(PACKAGE)})
    assert child.returncode == -signal.SIGKILL, child.stderr
    actual = checkpoint.paths(tmp_path / "checkpoints")
    assert [int(path.stem[5:]) for path in actual[-1:]] == [left] * bool(left)
    outcome = interrupted.train(tmp_path)
    assert outcome.reason == "done"
    assert not tree.diff(outcome.state, whole[1])
    assert rows_without_time(tmp_path) == rows_without_time(whole[0])


def test_ctrl_c_finishes_the_step_saves_and_goes_on_to_the_same_bits(tmp_path, whole):
    plain_step = interrupted.setting()[1]

    def stopping(state, batch):
        if int(state.step) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return plain_step(state, batch)

    before = signal.getsignal(signal.SIGINT)
    outcome = interrupted.train(tmp_path, stopping)
    assert outcome.reason == "interrupted" and int(outcome.state.step) == 8
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.paths(tmp_path / "checkpoints")[-1].name == "step-00000008.safetensors"
    assert not tree.diff(interrupted.train(tmp_path).state, whole[1])


def test_a_finished_run_has_nothing_left_to_do(whole):
    before = (whole[0] / "log.csv").read_text()
    assert not tree.diff(interrupted.train(whole[0]).state, whole[1])
    assert (whole[0] / "log.csv").read_text() == before


def test_the_newest_checkpoints_are_kept(whole):
    assert [path.name for path in checkpoint.paths(whole[0] / "checkpoints")] == [
        "step-00000020.safetensors",
        "step-00000023.safetensors",
    ]
    assert len(list((whole[0] / "checkpoints").iterdir())) == 2


def test_nan_stops_the_run_with_the_last_good_checkpoint(tmp_path):
    plain_step = interrupted.setting()[1]

    def failing(state, batch):
        done = int(state.step)
        state, metrics = plain_step(state, batch)
        return state, {**metrics, "loss": torch.tensor(math.nan if done == 13 else 1.0)}

    with pytest.raises(loop.DivergedError, match="loss is nan at step 14.*step-00000010.safetensors"):
        interrupted.train(tmp_path, failing)
    assert [path.name for path in checkpoint.paths(tmp_path / "checkpoints")][-1] == "step-00000010.safetensors"


def test_the_log_has_the_mean_of_every_window(tmp_path):
    plain_step = interrupted.setting()[1]
    seen = []

    def watched(state, batch):
        state, metrics = plain_step(state, batch)
        seen.append(float(metrics["loss"]))
        return state, metrics

    interrupted.train(tmp_path, watched)
    rows = log.read(tmp_path / "log.csv")
    assert [int(row["step"]) for row in rows] == [2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20, 22, 23]
    assert float(rows[1]["loss"]) == pytest.approx(sum(seen[2:4]) / 2, rel=1e-5)
    assert float(rows[2]["loss"]) == pytest.approx(seen[4], rel=1e-5)
    assert float(rows[1]["bin_0"]) == pytest.approx(float(rows[1]["loss"]), rel=1e-5) and rows[1]["bin_1"] == "nan"


def test_samples_are_drawn_at_their_steps_and_at_the_end(tmp_path):
    seen = []
    state, train_step, batch = interrupted.setting()
    loop.run(
        state, train_step, batch, steps=7, out=tmp_path, sample_every=3, progress=False,
        on_sample=lambda state, done: seen.append((int(state.step), done)),
    )  # fmt: skip
    assert seen == [(3, 3), (6, 6), (7, 7)]


def test_a_log_cut_in_the_middle_of_a_row_is_repaired(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,seconds,loss\n2,1.0,5\n4,2.0,4\n6,3.0,3\n8,4.")
    resumed = log.resume(path, 4)
    assert path.read_text() == "step,seconds,loss\n2,1.0,5\n4,2.0,4\n"
    log.append(resumed, 6, {"loss": 2.5}, 1.5, durable=False)
    assert log.read(path)[-1] == {"step": "6", "seconds": "3.500", "loss": "2.5"}


@pytest.mark.parametrize(("batch", "size"), [(4, 10), (7, 3), (5, 5), (3, 1)])
def test_every_epoch_is_a_permutation_of_its_own(batch, size):
    order = loop.order(prng.key(0), batch, size)
    steps = size * 6
    seen = torch.cat([order(step) for step in range(steps)])
    assert set(Counter(seen.tolist()).values()) == {batch * 6}
    epochs = seen.reshape(-1, size)
    assert (epochs.sort(1).values == torch.arange(size)).all()
    if size > 4:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) > len(epochs) // 2


def test_the_order_depends_on_the_step_alone():
    order, again = loop.order(prng.key(0), 4, 10), loop.order(prng.key(0), 4, 10)
    forwards = [order(step).tolist() for step in range(20)]
    assert [again(step).tolist() for step in reversed(range(20))][::-1] == forwards
    assert [loop.order(prng.key(1), 4, 10)(step).tolist() for step in range(20)] != forwards


def test_a_checkpoint_holds_every_leaf_and_the_settings(tmp_path):
    state = interrupted.setting()[0]
    path = checkpoint.save(tmp_path, 12, state, {"lr": 0.1})
    assert path.name == "step-00000012.safetensors"
    assert checkpoint.settings(path) == {"lr": 0.1}
    like = tree.map(torch.zeros_like, state)
    loaded = checkpoint.load(path, like)
    assert not tree.diff(loaded, state) and type(loaded) is type(state)
    loaded.params["in"].zero_()
    assert not tree.diff(checkpoint.load(path, like), state)


def test_a_checkpoint_of_another_model_is_refused_by_path(tmp_path):
    state = interrupted.setting()[0]
    path = checkpoint.save(tmp_path, 1, state, {})
    other = state._replace(params={"in": torch.zeros(2), "more": torch.zeros(1)})
    with pytest.raises(WeightsError) as caught:
        checkpoint.load(path, other)
    text = str(caught.value)
    assert "params.more is missing" in text and "params.out is unexpected" in text
    assert "params.in is torch.float32 [6, 8], the run has torch.float32 [2]" in text


def test_a_checkpoint_cut_short_is_refused(tmp_path):
    state = interrupted.setting()[0]
    path = checkpoint.save(tmp_path, 1, state, {})
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(WeightsError, match="step-00000001"):
        checkpoint.load(path, state)


def test_other_files_are_no_checkpoints(tmp_path):
    for name in ("step-1.safetensors.tmp", "data.safetensors", "step-x.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert checkpoint.paths(tmp_path) == [] and checkpoint.paths(tmp_path / "nowhere") == []
