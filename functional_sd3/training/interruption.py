"""Ctrl-C, SIGTERM and a closed terminal during training: a request to save and stop, not the end of the process.

A step is never cut in two, since a donated one would be lost, and a checkpoint is never given up: only what can be done
again (a sample image) is left at once.
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
    """Whether a run was asked to stop. `catch` makes the one of a run."""

    def __init__(self) -> None:
        self._signals = 0
        self._interrupts = 0
        self._abortable = False

    def is_requested(self) -> bool:
        """True once a signal arrived."""
        return self._signals > 0

    @contextmanager
    def abortable(self) -> Iterator[None]:
        """Work that may be given up: a signal within raises KeyboardInterrupt, once."""
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
        # Several SIGTERMs are a scheduler's way of being sure; only a person gives up what is not saved.
        if self._interrupts >= GIVE_UP:
            raise KeyboardInterrupt
        if self._interrupts == 2:
            # Not by print: a signal may arrive while that very stream is being written. Where standard error was closed
            # from the start, its number may be that of any file.
            if sys.__stderr__ is None:
                return
            with contextlib.suppress(OSError):
                os.write(2, b"\nfinishing the step and saving; Ctrl-C once more stops without saving\n")


@contextmanager
def catch() -> Iterator[Interruption]:
    """SIGINT, SIGTERM and SIGHUP counted instead of obeyed, from the third Ctrl-C on obeyed; none in other threads.

    A SIGHUP that is ignored (`nohup`) stays so.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    with _handled(dict.fromkeys((signal.SIGINT, *_TERMINATIONS), interruption._handle)):
        yield interruption


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, so that what was opened is closed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handled(dict.fromkeys(_TERMINATIONS, interrupt)):
        yield


@contextmanager
def _handled(handlers: dict[int, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in handlers}
    # A handler that was not installed from Python (None) cannot be put back from it.
    before = {number: handler for number, handler in before.items() if handler is not None}
    if before.get(_HANGUP) is signal.SIG_IGN:
        del before[_HANGUP]
    try:
        for number in before:
            signal.signal(number, handlers[number])
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
