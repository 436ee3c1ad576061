"""The watch: the end of one process is known to all others, with its reason where it gave one."""

import os
import queue
import time

import pytest

from functional_sd3.parallel import processes as teams
from functional_sd3.parallel import watch as watches
from functional_sd3.parallel.processes import Processes
from functional_sd3.parallel.watch import Watch


def ending(lost, how):
    """What a process learns of the end of another."""
    rank, losses = int(os.environ["RANK"]), queue.Queue()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watches, "_GRACE", 0.2)
        watch = Watch(losses.put)
        watch.reached(7)
        watches.dist.barrier()
        if rank == lost:
            if how == "dies":
                # As the system does for a process that is killed, whose threads no longer run.
                watch._is_closed = True
                for peer in watch._peers.values():
                    peer.shutdown(watches.socket.SHUT_RDWR)
            elif how == "fails":
                watch.failed(ValueError("image 7 is broken\nand more"))
            else:
                watch.close()
            return None
        if how == "ends":
            time.sleep(0.5)
            watch.close()
            return losses.qsize()
        loss = losses.get(timeout=50)
        assert losses.empty()
        watch.close()
        return tuple(loss)


@pytest.mark.parametrize("lost", [0, 2])
def test_all_others_learn_of_the_end_of_a_process(processes, lost):
    for how, wanted in {"dies": (lost, 7, None), "fails": (lost, 7, "image 7 is broken"), "ends": 0}.items():
        results = processes(4, ending, lost, how)
        assert results == [None if rank == lost else wanted for rank in range(4)], how


def same_error():
    """All raise: each reports its own error, and none is ended by another's."""
    losses = queue.Queue()
    watch = Watch(losses.put)
    watch.failed(ValueError("the same"))
    time.sleep(0.3)
    return losses.qsize()


def consequence():
    """A collective that fails as another process was lost: the watch ends this one, not the collective's error."""
    losses = queue.Queue()
    watch = Watch(losses.put)
    if os.environ["RANK"] == "1":
        watch.failed(ValueError("the cause"))
        return None
    watch.failed(RuntimeError("Connection closed by peer"))
    return losses.get(timeout=50).reason


def test_errors_of_all_and_consequences_are_told_apart(processes):
    assert processes(2, same_error) == [0, 0]
    assert processes(2, consequence)[0] == "the cause"


def chained():
    alone = Processes()
    try:
        alone.fail(ValueError("of all"))
    except ValueError as error:
        raise RuntimeError("with advice") from error


def test_errors_that_end_all_are_known_through_their_causes():
    with pytest.raises(RuntimeError, match="with advice") as caught:
        chained()
    assert teams.is_on_all(caught.value) and teams.is_on_all(teams.ElsewhereError("process 0: x"))
    assert not teams.is_on_all(RuntimeError("mine")) and not teams.is_on_all(None)
