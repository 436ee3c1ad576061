"""Checkpoints, logs and settings that a crash or a stranger left: an error that names the file, or the one before."""

import json
import math
import os

import pytest
import torch

from functional_sd3.core import tree
from functional_sd3.formats import files
from functional_sd3.training import checkpoint, log
from functional_sd3.weights import WeightsError
from tests.training import interrupted


@pytest.fixture
def state():
    return interrupted.setting()[0]


def saved(folder, state, *steps, settings=None):
    """Checkpoints of `steps`, which differ in their step alone."""
    states = {step: state._replace(step=torch.tensor(step)) for step in steps}
    return {step: checkpoint.save(folder, step, own, settings or {"lr": 0.1}) for step, own in states.items()}


def cut(path):
    os.truncate(path, path.stat().st_size - 10)


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def nan(path):
    tensors, header = {}, files.open_mapped(path)
    for name in header.header.tensors:
        tensors[name] = files.tensor(header, name).clone()
    tensors["params.in"][0, 0] = math.nan
    files.write_atomic(path, tensors, metadata=header.header.metadata)


def with_settings(text):
    def damage(path):
        mapped = files.open_mapped(path)
        tensors = {name: files.tensor(mapped, name).clone() for name in mapped.header.tensors}
        files.write_atomic(path, tensors, metadata={"settings": text})

    return damage


def another_step(path):
    os.replace(path, path.with_name("step-00000099.safetensors"))


DAMAGES = {
    "cut short": cut,
    "zeros": zeros,
    "empty": lambda path: path.write_bytes(b""),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "NaN": nan,
    "another step": another_step,
    "settings no JSON": with_settings("{"),
    "settings a list": with_settings("[1]"),
    "settings deep": with_settings("[" * 100_000),
    "settings NaN": with_settings('{"lr": NaN}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_newest_checkpoint_that_is_damaged_gives_way_to_the_one_before(tmp_path, state, damage):
    paths = saved(tmp_path, state, 5, 10)
    DAMAGES[damage](paths[10])
    checked = []
    resumed = checkpoint.load_newest(tmp_path, state, checked.append)
    assert resumed.path == paths[5] and int(resumed.state.step) == 5 and resumed.settings == {"lr": 0.1}
    assert checked[-1] == {"lr": 0.1}
    assert not tree.diff(resumed.state, state._replace(step=torch.tensor(5)))
    ((path, error),) = resumed.passed_over
    assert isinstance(error, WeightsError) and str(path) in str(error)
    assert checkpoint.set_aside(path).exists() and checkpoint.paths(tmp_path) == [paths[5]]


def test_where_none_can_be_read_every_one_is_named(tmp_path, state):
    paths = saved(tmp_path, state, 5, 10)
    nan(paths[5])
    cut(paths[10])
    with pytest.raises(WeightsError) as caught:
        checkpoint.load_newest(tmp_path, state, lambda settings: None)
    assert all(str(path) in str(caught.value) for path in paths.values())
    assert "params.in holds NaN" in str(caught.value)


def test_the_check_of_settings_is_not_passed_over(tmp_path, state):
    saved(tmp_path, state, 5, 10)

    def refuse(settings):
        raise ValueError(f"lr {settings['lr']}")

    with pytest.raises(ValueError, match="lr 0.1"):
        checkpoint.load_newest(tmp_path, state, refuse)


HEADER = "step,seconds,loss\n"


@pytest.mark.parametrize(
    "text",
    [
        "2,1.0,5\n4,2.0,4\n",
        "step,loss\n2,5\n",
        "step,seconds,loss,loss\n2,1,5,5\n",
        "\0\0\0\0\n" + HEADER + "2,1.0,5\n",
        '"' + "x" * 200_000 + '"\n',
    ],
)
def test_a_log_without_its_columns_is_an_error_that_names_it(tmp_path, text):
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(WeightsError, match="log.csv: .*move it away"):
        log.resume(path, 4)
    assert path.read_text() == text


@pytest.mark.parametrize("special", [os.mkdir, os.mkfifo])
def test_a_log_that_is_no_file_is_an_error_that_names_it(tmp_path, special):
    special(tmp_path / "log.csv")
    with pytest.raises(WeightsError, match="log.csv: is a .*, not a file"):
        log.resume(tmp_path / "log.csv", 4)


@pytest.mark.parametrize(
    "tail",
    [
        "\0" * 50, "\0" * 50 + "\n", "6,3", "6,\0\0\0,3\n", "6,3.0\n", "6,3.0,3,3\n", "-1,2,3\n", "6,x,3\n",
        "9" * 5000 + ",1,2\n",
    ],
)  # fmt: skip
def test_rows_that_a_crash_spoiled_are_left_out(tmp_path, tail):
    path = tmp_path / "log.csv"
    path.write_text(HEADER + "2,1.0,5\n4,2.0,4\n" + tail)
    resumed = log.resume(path, 10)
    assert path.read_text() == HEADER + "2,1.0,5\n4,2.0,4\n" and resumed.seconds == 2.0
    log.append(resumed, 6, {"loss": 3.0}, 1.0, durable=True)
    assert [row["step"] for row in log.read(path)] == ["2", "4", "6"]


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"step,sec"])
def test_a_log_that_did_not_come_to_its_first_line_begins_anew(tmp_path, content):
    path = tmp_path / "log.csv"
    path.write_bytes(content)
    log.append(log.resume(path, 0), 2, {"loss": 5.0}, 1.0, durable=False)
    assert path.read_text() == HEADER + "2,1.000,5\n"


def test_a_row_that_is_written_by_half_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "log.csv"
    table = log.append(log.resume(path, 0), 2, {"loss": 5.0}, 1.0, durable=False)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WeightsError, match="log.csv: cannot be written: no space left"):
        log.append(table, 4, {"loss": 4.0}, 2.0, durable=True)
    assert path.read_bytes() == before


def test_settings_are_kept_as_they_were(tmp_path, state):
    given = {"lr": 1e-4, "name": "\ud800 é", "none": None, "list": [1, 2]}
    path = saved(tmp_path, state, 5, settings=given)[5]
    assert checkpoint.settings(path) == json.loads(json.dumps(given))
