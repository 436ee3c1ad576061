"""Two runs never share a folder, and a run that died holds none."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from functional_sd3.training import lock
from functional_sd3.weights import WeightsError

PACKAGE = Path(lock.__file__).parents[2]
HOLDING = """
import sys
from functional_sd3.training import lock
with lock.hold(sys.argv[1], print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    command = [sys.executable, "-c", HOLDING, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as child:
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


def without_flock(monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)


@pytest.mark.parametrize("has_flock", [True, False])
def test_a_second_run_is_refused_by_the_name_of_the_first_until_that_dies(tmp_path, holder, monkeypatch, has_flock):
    if not has_flock:
        without_flock(monkeypatch)
    with pytest.raises(WeightsError, match=f"is being trained in by process {holder.pid} since 20.*--out"):
        with lock.hold(tmp_path, pytest.fail):
            pass
    assert (tmp_path / lock.NAME).exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    notes = []
    with lock.hold(tmp_path, notes.append):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert len(notes) == 1 and f"process {holder.pid}, which held the lock of this folder, has ended" in notes[0]
    assert not (tmp_path / lock.NAME).exists()


def test_a_process_does_not_hold_a_folder_twice(tmp_path):
    with lock.hold(tmp_path, pytest.fail), pytest.raises(WeightsError, match=f"by process {os.getpid()} since"):
        with lock.hold(tmp_path, pytest.fail):
            pass
    with lock.hold(tmp_path, pytest.fail):
        pass


def left(folder, **changes):
    fields = {**lock.this_process()._asdict(), **changes}
    (folder / lock.NAME).write_text(json.dumps(fields))


STALE = {
    "an earlier boot": {"boot": "11111111-2222-3333-4444-555555555555"},
    "a number that was used again": {"tick": "1"},
    "a number beyond all": {"pid": 2**40},
}


@pytest.mark.parametrize("has_flock", [True, False])
@pytest.mark.parametrize("case", STALE)
@pytest.mark.skipif(not os.path.exists("/proc/sys/kernel/random/boot_id"), reason="the boot's name is Linux's")
def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path, monkeypatch, case, has_flock):
    if not has_flock:
        without_flock(monkeypatch)
    left(tmp_path, **STALE[case])
    notes = []
    with lock.hold(tmp_path, notes.append):
        assert len(notes) == 1 and "has ended" in notes[0]


@pytest.mark.parametrize("has_flock", [True, False])
def test_the_error_for_the_lock_of_another_machine_says_how_to_remove_it(tmp_path, monkeypatch, has_flock):
    if not has_flock:
        without_flock(monkeypatch)
    left(tmp_path, host="node\x1b[2J17", boot="x")
    with pytest.raises(WeightsError, match=r"on another machine, node\\x1b\[2J17, .*delete .*train.lock and try again"):
        with lock.hold(tmp_path, pytest.fail):
            pass
    assert (tmp_path / lock.NAME).exists()


@pytest.mark.parametrize(
    "content",
    [b"nonsense", b"[]", b"\0" * 200, b'{"pid": "x"}', b'{"pid": 1e400}', b"9" * 10_000, b'{"pid": -1, "host": ""}'],
)
def test_the_error_for_a_lock_without_holder_says_how_to_remove_it(tmp_path, content):
    (tmp_path / lock.NAME).write_bytes(content)
    with pytest.raises(WeightsError, match="train.lock"):
        with lock.hold(tmp_path, pytest.fail):
            pass
    assert (tmp_path / lock.NAME).read_bytes() == content


def test_an_empty_lock_without_holder_is_taken(tmp_path):
    (tmp_path / lock.NAME).touch()
    with lock.hold(tmp_path, pytest.fail):
        pass


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("elsewhere", path)])
def test_a_lock_that_is_no_regular_file_is_refused(tmp_path, make):
    make(tmp_path / lock.NAME)
    with pytest.raises(WeightsError, match="train.lock"):
        with lock.hold(tmp_path, pytest.fail):
            pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_made_for_nothing_is_removed_again(tmp_path):
    with pytest.raises(ValueError, match="later"):
        with lock.hold(tmp_path / "new" / "er", pytest.fail):
            raise ValueError("later")
    assert not (tmp_path / "new").exists() and tmp_path.exists()
    with lock.hold(tmp_path / "new", pytest.fail):
        (tmp_path / "new" / "kept").touch()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["kept"]


def test_a_folder_in_which_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="file"):
        with lock.hold(tmp_path / "file", pytest.fail):
            pass


def test_the_holder_is_this_machine():
    this = lock.this_process()
    assert this.host == socket.gethostname() and lock.is_running(this)
