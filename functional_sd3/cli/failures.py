"""Exceptions as sentences on standard error and exit statuses."""

import errno
import os
import traceback
from contextlib import contextmanager
from types import FrameType

from functional_sd3.cli import flags, report
from functional_sd3.cli.parser import CommandLine
from functional_sd3.formats.errors import WeightsError

_OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")
_SAVING = (
    ("batch", "--batch 1"),
    ("batch_size", "--batch-size 1"),
    ("offload", "--offload"),
    ("tile", "--tile 512"),
    ("dtype", "--dtype bfloat16"),
    ("accumulate", "a larger --accumulate"),
    ("size", "a smaller --size"),
)
"""Option -> what to write of it, that takes less memory; a command has some of them."""


def report_failure(error: BaseException, name: str, given: CommandLine | None) -> int:
    """Say what went wrong on standard error, and return the exit status.

    name: of the command; given: its command line, None where that was not read to its end.
    """
    if type(error).__name__ == "ElsewhereError" and _is_ours(error):
        # Another process of the run reports it.
        return 1
    if given is not None and given.debug:
        report.error("".join(traceback.format_exception(error)).rstrip())
    notes = "; ".join(getattr(error, "__notes__", ()))
    if isinstance(error, KeyboardInterrupt):
        report.error((f"\n{notes}" if notes else "") + "\nstopped")
        return 130
    report.error(f"{name}: {sentence(error, given)}" + (f"\n{notes}" if notes else ""))
    return 1


@contextmanager
def noted_interrupts():
    """Yields a list that is empty until Ctrl-C was pressed.

    Within an import that precedes the work the process ends at once: modules that are imported may swallow a
    KeyboardInterrupt, or make an ImportError of it, and nothing is lost yet.
    """
    import signal
    import threading

    pressed: list[int] = []

    def interrupt(number, frame):
        pressed.append(number)
        if _only_imports(frame):
            os.write(2, b"\nstopped\n")
            os._exit(130)
        raise KeyboardInterrupt

    usual = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if usual:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield pressed
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _only_imports(frame: FrameType | None) -> bool:
    """True if a module is being imported, and no images are being drawn meanwhile."""
    importing = False
    while frame is not None:
        if frame.f_globals.get("__name__") == "functional_sd3.cli.writer":
            return False
        importing |= frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return importing


def is_out_of_memory(error: BaseException) -> bool:
    """True for every error by which Python, numpy, torch or the system reports that memory is exhausted."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)
    )


def sentence(error: BaseException, given: CommandLine | None = None) -> str:
    """Sentence on what went wrong; given: the command line, whose options may be what to change."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if is_out_of_memory(error):
        advice = [words for option, words in _SAVING if given is not None and hasattr(given.options, option)]
        return f"out of memory ({first})" + (f"; less is needed with {', '.join(advice)}" if advice else "")
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{place}"
    if isinstance(error, ValueError | ArithmeticError | RuntimeError | ImportError) or _is_ours(error):
        words = str(error) or type(error).__name__
        # Problems of files name what is written in them.
        return words if given is None or isinstance(error, WeightsError) else flags.with_flags(words, given.options)
    return f"a fault of this program: {type(error).__name__}: {error} (--debug prints where)"


def _is_ours(error: BaseException) -> bool:
    return type(error).__module__.startswith("functional_sd3.")
