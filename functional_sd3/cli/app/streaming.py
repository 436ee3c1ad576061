"""A computation on a thread of its own, as an iterator of what it emits, which ends it when it is closed."""

import contextvars
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Stopped(BaseException):
    """Raised within a computation whose results nobody awaits any more. No Exception: nothing is to handle it."""


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
    thread = threading.Thread(target=context.run, args=(run,), name="functional-sd3 app: drawing", daemon=True)
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
