"""Processes of a torch.distributed group (gloo) for tests, started once a session and kept.

    result_of_each = processes(4, work, argument)

runs `work(argument)` in four processes and returns their results in the order of the ranks. `work` is a function of a
module that can be imported; arguments and results are pickled. The first failure is raised here with its traceback.
Processes that do not finish in time are killed, and the next call starts new ones: nothing hangs.
"""

import contextlib
import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT = 60.0
_GRACE = 1.0
"""Seconds that the others have to finish after one has failed; then they wait for it in a collective for ever."""


class ProcessError(AssertionError):
    """A function failed in a process, or did not return."""


class Pool:
    """Groups of 2, 4, ... processes by their number."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.preloaded"])
        self._groups: dict[int, list[tuple[Any, Connection]]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="processes-")
        self._started = 0

    def __call__(self, count: int, fn: Callable[..., Any], *args: Any, timeout: float = TIMEOUT, **kwargs: Any) -> list:
        """The results of fn(*args, **kwargs) in `count` processes, by rank."""
        if count not in self._groups:
            self._groups[count] = self._start(count)
        task = dumps((fn, args, kwargs))
        waiting: dict[Any, int] = {}
        for rank, (_, connection) in enumerate(self._groups[count]):
            connection.send_bytes(task)
            waiting[connection] = rank
        results: list[Any] = [None] * count
        failed: tuple[int, str] | None = None
        end = time.monotonic() + timeout
        while waiting and (ready := wait(list(waiting), max(0.0, end - time.monotonic()))):
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    succeeded, value = loads(connection.recv_bytes())
                except (EOFError, OSError):
                    succeeded, value = False, "the process died"
                if succeeded:
                    results[rank] = value
                elif failed is None:
                    failed, end = (rank, value), min(end, time.monotonic() + _GRACE)
        if failed is None and not waiting:
            return results
        self.stop(count)
        if failed is None:
            raise ProcessError(f"processes {sorted(waiting.values())} of {count} did not return in {timeout} s")
        raise ProcessError(f"process {failed[0]} of {count} failed:\n{failed[1]}")

    def stop(self, count: int | None = None) -> None:
        """Kill the processes of the group of `count`, or all."""
        for number in [count] if count else list(self._groups):
            for process, connection in self._groups.pop(number, []):
                connection.close()
                process.kill()
                process.join()

    def close(self) -> None:
        self.stop()
        self._folder.cleanup()

    def _start(self, count: int) -> list[tuple[Any, Connection]]:
        self._started += 1
        store = Path(self._folder.name) / f"store-{self._started}"
        group = []
        for rank in range(count):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs, store, rank, count), daemon=True)
            process.start()
            theirs.close()
            group.append((process, ours))
        return group


def dumps(value: Any) -> bytes:
    """Pickled as torch does, which knows every dtype."""
    import torch

    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def loads(data: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)


def _serve(connection: Connection, store: Path, rank: int, count: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count))
    limit = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=limit)
    _keep_groups()
    with contextlib.suppress(EOFError, OSError):
        while True:
            message = connection.recv_bytes()
            try:
                fn, args, kwargs = loads(message)
                answer = dumps((True, fn(*args, **kwargs)))
            except BaseException:
                answer = dumps((False, traceback.format_exc()))
            connection.send_bytes(answer)
    # Without the teardown of the group, which waits for processes that may be gone.
    os._exit(0)


def _keep_groups() -> None:
    """Every process makes a group of the same members once: the threads of each wake a hundred times a second for as
    long as a process is kept, and tests make hundreds of meshes."""
    import torch.distributed as dist

    groups: dict[tuple[int, ...], Any] = {}
    new_group = dist.new_group

    def kept(ranks: Any) -> Any:
        key = tuple(ranks)
        if key not in groups:
            groups[key] = new_group(ranks)
        return groups[key]

    dist.new_group = kept
