"""What an evaluation found, for people on standard output and for programs as JSON."""

import json
import math
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from functional_sd3.image.pictures import Skipped

_MOST_NAMED = 10


class Report(NamedTuple):
    """`text` for people, line by line; `data` for programs, in the words of JSON."""

    text: tuple[str, ...]
    data: dict[str, Any]


def check_writable(*paths: str | None) -> None:
    """Fails before the work rather than after it."""
    for path in paths:
        if path is None or path == "-":
            continue
        parent = Path(path).resolve().parent
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder; a file is needed")
        if not parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {parent}")
        probe = parent / f".{Path(path).name}.probe"
        probe.touch()
        probe.unlink()


def emit(path: str | None, report: Report) -> None:
    """Prints the report, or its JSON where `path` is -; writes the JSON to any other path."""
    from functional_sd3.weights import files

    content = json.dumps(_finite(report.data), indent=2, ensure_ascii=False)
    if path == "-":
        print(content)
        return
    if path:
        files.write_atomic(path, (content + "\n").encode())
    for line in report.text:
        print(line)


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def note_skipped(where: str, count: int, skipped: tuple[Skipped, ...]) -> None:
    """Says on standard error which of the `count` pictures of a set were left out."""
    if not skipped:
        return
    note(f"{len(skipped)} of {count} pictures of {where} were skipped:")
    for path, reason in skipped[:_MOST_NAMED]:
        print(f"  {path}: {reason}", file=sys.stderr)
    if len(skipped) > _MOST_NAMED:
        print(f"  and {len(skipped) - _MOST_NAMED} more (all of them in the output of --json)", file=sys.stderr)


@contextmanager
def warnings_as_notes():
    """Warnings that the metrics raise become notes: a person at a terminal has no use for lines of source code."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        note(text)


def progress(items: Iterable, total: int, name: str, unit: str = "picture"):
    from tqdm import tqdm

    return tqdm(items, total=total, desc=name, unit=unit, leave=False, disable=None)


def _finite(data: Any) -> Any:
    """JSON has no infinity and no NaN: null."""
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
