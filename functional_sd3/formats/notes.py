"""Notes on a result that are no errors: a warning in Python, a `note:` line at the command line."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from functional_sd3.formats.printable import escape

_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep


class Note(UserWarning):
    """Something stated once: a component that is missing, weights loaded in another dtype than they are stored in."""


def note(message: str) -> None:
    """`warnings.warn` of a Note at the line outside this package that led here."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(escape(message), Note, stacklevel=level)


@contextmanager
def printed() -> Iterator[None]:
    """Within it, every Note is one line `note: ...` on standard error, the same sentence once; other warnings stay.

    For programs: it replaces a hook of the whole process while it lasts.
    """
    seen: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", Note)
        show = warnings.showwarning

        def show_note(message, category, *place, **options) -> None:
            if not issubclass(category, Note):
                show(message, category, *place, **options)
            elif str(message) not in seen:
                seen.add(str(message))
                print(f"note: {message}", file=sys.stderr)

        warnings.showwarning = show_note
        yield
