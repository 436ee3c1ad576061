"""A computation on a thread of its own, as an iterator of what it emits, which ends it when it is closed."""

import contextvars
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Stopped(BaseException):
    """Raised within a computation whose results are not awaited any more. Not an Exception, so that no handler catches
    it."""


class Computation(threading.Thread):
    """A thread that computes until `closed` is set."""

    def __init__(self, run: Callable[[], None], closed: threading.Event) -> None:
        super().__init__(target=run, name="functional-sd3 app: drawing", daemon=True)
        self.closed = closed


def end_all(seconds: float) -> bool:
    """End every computation of this process at its next value; True if all have ended within `seconds`."""
    running = [thread for thread in threading.enumerate() if isinstance(thread, Computation)]
    for thread in running:
        thread.closed.set()
    until = time.monotonic() + seconds
    for thread in running:
        thread.join(max(0.0, until - time.monotonic()))
    return not any(thread.is_alive() for thread in running)


def stream(work: Callable[[Callable[[T], None]], None], *, every: float = 0.5) -> Iterator[T | None]:
    """The values that `work(emit)` emits, as they come, and None where `every` seconds bring none.

    `emit` waits until the value before was taken, so that a computation is never ahead of its reader, and raises
    `Stopped` in it once the iterator is closed or dropped. An error of `work` is raised by the iterator.
    """
    results: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(1)
    closed = threading.Event()

    def put(result: tuple[T] | BaseException | None) -> None:
        while not closed.is_set():
            try:
                return results.put(result, timeout=0.1)
            except queue.Full:
                pass
        raise Stopped

    def run() -> None:
        end: BaseException | None = None
        try:
            try:
                work(lambda value: put((value,)))
            except Exception as error:
                end = error
            put(end)
        except Stopped:
            pass

    context = contextvars.copy_context()
    thread = Computation(lambda: context.run(run), closed)
    thread.start()
    try:
        while True:
            try:
                result = results.get(timeout=every)
            except queue.Empty:
                yield None
                continue
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            yield result[0]
    finally:
        closed.set()
