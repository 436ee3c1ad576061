"""Output of all commands: results on standard output, notes, progress and errors on standard error.

No other module of this package prints. Whatever a terminal would act on is escaped here, whether it came from the name
of a file or tensor, metadata or the command line; `--quiet` is known here alone.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from functional_sd3.formats import printable

if TYPE_CHECKING:
    from functional_sd3.image.folders import Skipped

_MAX_NAMED = 10
_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)
_COLLECTED: ContextVar[list[str] | None] = ContextVar("collected", default=None)


class Report(NamedTuple):
    """`text` to read, line by line; `data` for programs, as JSON."""

    text: tuple[str, ...]
    data: dict[str, Any]


@contextmanager
def printing(*, quiet: bool) -> Iterator[None]:
    """Within it the notes of all packages are printed; `quiet`: none, and neither progress nor Python's warnings.

    Of several processes the first alone prints, but for errors.
    """
    import warnings

    from functional_sd3.formats import notes

    quiet = quiet or not is_first_process()
    token = _QUIET.set(quiet)
    try:
        with warnings.catch_warnings() if quiet else notes.printed():
            if quiet:
                warnings.simplefilter("ignore")
            yield
    finally:
        _QUIET.reset(token)


@contextmanager
def collected() -> Iterator[list[str]]:
    """Within it messages and notes go into the list that it yields instead of standard error: for a page to show."""
    lines: list[str] = []
    token = _COLLECTED.set(lines)
    try:
        yield lines
    finally:
        _COLLECTED.reset(token)


def has_launcher() -> bool:
    """True in a process that torchrun, or something that sets the same variables, has started."""
    return all(os.environ.get(name, "").isdecimal() for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def is_first_process() -> bool:
    """True in the one of several processes that prints and writes, and without others."""
    return not has_launcher() or int(os.environ["RANK"]) == 0


def say(text: object) -> None:
    """Print one line of a command's result on standard output, at once."""
    if is_first_process():
        _print(sys.stdout, printable.escape(text))


def message(text: object) -> None:
    """Print one line about the run on standard error, unless --quiet."""
    lines = _COLLECTED.get()
    if lines is not None:
        lines.append(str(text))
    elif not _QUIET.get():
        _print(sys.stderr, printable.escape(text))


def note(text: object) -> None:
    """Print "note: TEXT" on standard error, unless --quiet."""
    message(f"note: {text}")


def error(text: object) -> None:
    """Print a text of one or more lines on standard error; of several processes each prints its own."""
    words = "" if is_first_process() else f"process {os.environ['RANK']}: "
    _print(sys.stderr, words + printable.escape(text, keep="\n"))


def emit(path: str | None, report: Report) -> None:
    """Prints the report, or its JSON where `path` is -; writes the JSON to any other path."""
    content = as_json(report.data)
    if path == "-":
        if is_first_process():
            _print(sys.stdout, content)
        return
    if path and is_first_process():
        from functional_sd3.formats import files

        files.write_atomic(path, (content + "\n").encode())
    for line in report.text:
        say(line)


def as_json(data: Any) -> str:
    """JSON in which infinity and NaN are null, and characters that a terminal acts on are JSON's escapes."""
    content = json.dumps(_finite(data), indent=2, ensure_ascii=False)
    if printable.escape(content, keep="\n") == content:
        return content
    # Such characters are within strings only: json has written line ends in them as \\n.
    harmless = {letter for letter in set(content) if printable.escape(letter, keep="\n") == letter}
    return "".join(letter if letter in harmless else _json_escape(letter) for letter in content)


def note_skipped(where: str, count: int, skipped: "tuple[Skipped, ...]") -> None:
    """Says on standard error which of the `count` images of a set were left out."""
    if not skipped:
        return
    note(f"{len(skipped)} of {count} images of {where} were skipped:")
    for path, reason in skipped[:_MAX_NAMED]:
        message(f"  {path}: {reason}")
    if len(skipped) > _MAX_NAMED:
        message(f"  and {len(skipped) - _MAX_NAMED} more (all of them in the output of --json)")


@contextmanager
def warnings_as_notes():
    """Warnings that the metrics raise become notes: a person at a terminal has no use for lines of source code."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        note(text)


def progress(items: Iterable, total: int, name: str, unit: str = "image"):
    """The items, counted by a bar on a terminal."""
    from tqdm import tqdm

    return tqdm(items, total=total, desc=printable.escape(name), unit=unit, leave=False, disable=_disable())


def has_bars() -> bool:
    """True if progress bars are drawn: on a terminal that has a width (some containers' have none), unless --quiet."""
    if sys.stderr is None or _QUIET.get():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def progress_bar(total: int, unit: str = "step") -> Any:
    """A bar on a terminal, moved by its `update`."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, leave=False, disable=_disable())


def _disable() -> bool | None:
    """True where no bar is drawn; None leaves it to tqdm, which draws them on terminals."""
    return _QUIET.get() or sys.stderr is None or None


def _print(stream: TextIO | None, text: str) -> None:
    if stream is None:  # Standard output that was closed.
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    # At once: lines of several processes do not mix.
    with _without_bars(stream):
        print(text.encode(encoding, "backslashreplace").decode(encoding) + "\n", end="", file=stream, flush=True)


def _without_bars(stream: TextIO) -> AbstractContextManager[Any]:
    """Within it no bar is on the line of the terminal that is written next: a bar ends without a line end."""
    # Not imported for that: what has drawn a bar has imported it.
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    return bars.external_write_mode(stream) if bars else nullcontext()


def _json_escape(letter: str) -> str:
    return json.dumps(letter).strip('"') if letter != "\x7f" else "\\u007f"


def _finite(data: Any) -> Any:
    """JSON has no infinity and no NaN: null."""
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
