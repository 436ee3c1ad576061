"""The processes of the tests: failures come back with their traceback, and nothing hangs."""

import os
import signal
import time

import pytest

from functional_sd3.parallel import mesh
from tests.processes import ProcessError


def identity(value):
    return os.getpid(), value


def failing(rank):
    grid = mesh.init({"data": int(os.environ["WORLD_SIZE"])})
    if grid.rank == rank:
        raise KeyError("the reason")
    mesh.dist.barrier(grid.group())


def dying():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def hanging():
    time.sleep(60)


def test_processes_are_kept_until_one_fails(processes):
    first, second = (processes(2, identity, value) for value in "ab")
    assert [pid for pid, _ in first] == [pid for pid, _ in second] and second[0][1] == "b"
    with pytest.raises(ProcessError, match="process 1 of 2 failed:\n") as error:
        processes(2, failing, 1)
    assert "in failing" in str(error.value) and "KeyError: 'the reason'" in str(error.value)
    with pytest.raises(ProcessError, match="the process died"):
        processes(2, dying)
    with pytest.raises(ProcessError, match=r"processes \[0, 1\] of 2 did not return in 0.2 s"):
        processes(2, hanging, timeout=0.2)
    fresh = processes(2, identity, "c")
    assert {pid for pid, _ in fresh}.isdisjoint({pid for pid, _ in first})


def makes_meshes():
    one, other = (mesh.init({"data": 2, "fsdp": 2}) for _ in range(2))
    return (
        all(one.group(axis) is other.group(axis) for axis in ("data", "fsdp")) and one.group("data") is not one.group()
    )


def test_groups_of_the_same_processes_are_made_once(processes):
    assert processes(4, makes_meshes) == [True] * 4
