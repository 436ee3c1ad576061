"""Signals during training: Ctrl-C, SIGTERM and SIGHUP request that the run saves and stops.

A step is always finished, since half of a donated one would lose the state, and so is a checkpoint; only a sample
image, which can be drawn again, is abandoned at once.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GIVE_UP = 3
"""The number of the Ctrl-C that ends a run at once, without saving."""
_HANGUP = getattr(signal, "SIGHUP", None)
_TERMINATIONS = tuple(number for number in (signal.SIGTERM, _HANGUP) if number is not None)


class Interruption:
    """State of the signals that request a run to stop; created by `catch`."""

    def __init__(self) -> None:
        self._signals = 0
        self._interrupts = 0
        self._abortable = False

    def is_requested(self) -> bool:
        """True once a signal arrived."""
        return self._signals > 0

    @contextmanager
    def abortable(self) -> Iterator[None]:
        """Context of work that may be abandoned: a signal within it raises KeyboardInterrupt, once."""
        self._abortable = True
        try:
            yield
        finally:
            self._abortable = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        self._interrupts += number == signal.SIGINT
        if self._abortable:
            self._abortable = False
            raise KeyboardInterrupt
        # Schedulers repeat SIGTERM; only a repeated Ctrl-C discards the steps that are not saved.
        if self._interrupts >= GIVE_UP:
            raise KeyboardInterrupt
        if self._interrupts == 2:
            # Not by print: a signal may arrive while that stream is being written. Where standard error was closed
            # from the start, its number may be that of any file.
            if sys.__stderr__ is None:
                return
            with contextlib.suppress(OSError):
                os.write(2, b"\nfinishing the step and saving; Ctrl-C once more stops without saving\n")


@contextmanager
def catch() -> Iterator[Interruption]:
    """Context in which SIGINT, SIGTERM and SIGHUP are recorded; the third Ctrl-C raises KeyboardInterrupt.

    Only in the main thread; a SIGHUP that is ignored (`nohup`) stays ignored.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    with _handled(dict.fromkeys((signal.SIGINT, *_TERMINATIONS), interruption._handle)):
        yield interruption


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Context in which SIGTERM and SIGHUP raise KeyboardInterrupt as Ctrl-C does, so that open resources are closed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handled(dict.fromkeys(_TERMINATIONS, interrupt)):
        yield


@contextmanager
def _handled(handlers: dict[int, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    current = {number: signal.getsignal(number) for number in handlers}
    # A handler that was not installed from Python (None) cannot be put back from it; an ignored hangup stays so.
    before = {
        number: handler
        for number, handler in current.items()
        if handler is not None and not (number == _HANGUP and handler is signal.SIG_IGN)
    }
    try:
        for number in before:
            signal.signal(number, handlers[number])
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
