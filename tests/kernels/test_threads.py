"""`dispatch.plain` and `dispatch.watched` hold for the thread that runs them, under a compiler too."""

import threading
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode

from functional_sd3 import kernels
from functional_sd3.core import dispatch
from functional_sd3.core.dispatch import Kernel, op


@op
def doubled(x):
    return 2 * x


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """A kernel of `doubled` that can be told apart from the formula."""
    tracking = frozenset({"none", "compiler"})
    monkeypatch.setitem(kernels.TABLE, "test_threads.doubled", (Kernel(lambda x: x + 100, lambda x: True, tracking),))


@contextmanager
def thread_within(manager):
    """Another thread stays within the context manager for as long as this one is within."""
    entered, done = threading.Event(), threading.Event()

    def run():
        with manager():
            entered.set()
            done.wait(60)

    thread = threading.Thread(target=run)
    thread.start()
    assert entered.wait(60)
    try:
        yield
    finally:
        done.set()
        thread.join(60)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_plain_in_one_thread_leaves_the_kernels_of_another(compiled):
    call = torch.compile(doubled, backend="eager", fullgraph=True) if compiled else doubled
    x = torch.tensor(3.0)
    with dispatch.plain():
        assert call(x) == 6
    assert call(x) == 103
    with thread_within(dispatch.plain):
        assert call(x) == 103
        with dispatch.plain(), dispatch.plain():
            assert call(x) == 6
    found = []
    with dispatch.plain():
        thread = threading.Thread(target=lambda: found.append(float(call(x))))
        thread.start()
        thread.join(60)
    assert found == [103.0]


def test_watched_in_one_thread_leaves_the_modes_of_another():
    with TorchFunctionMode(), thread_within(dispatch.watched):
        assert dispatch.in_mode()
        with dispatch.watched():
            assert not dispatch.in_mode()
