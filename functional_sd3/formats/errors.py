"""The one error of everything that reads or writes weights."""

import errno
from collections.abc import Callable, Iterable
from typing import TypeVar

from functional_sd3.formats.printable import escape

Result = TypeVar("Result")
_MAX_SHOWN = 50


class WeightsError(ValueError):
    """Files that cannot be read or written; `problems` has one sentence each, naming file and key."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        problems = (problems,) if isinstance(problems, str) else problems
        # Names in hostile files may hold what a terminal acts on.
        self.problems = tuple(escape(problem) for problem in problems)
        shown = self.problems[:_MAX_SHOWN]
        more = len(self.problems) - len(shown)
        title = f"{len(self.problems)} problems:\n  " if len(self.problems) > 1 else ""
        super().__init__(title + "\n  ".join(shown) + (f"\n  and {more} more (see .problems)" if more else ""))


def attempt(problems: list[str], function: Callable[..., Result], *arguments, **options) -> Result | None:
    """`function(*arguments, **options)`; None when it raises a WeightsError, whose sentences then join `problems`."""
    try:
        return function(*arguments, **options)
    except WeightsError as error:
        problems.extend(error.problems)
        return None


def reason(error: OSError) -> str:
    """The system's message without the path, which our messages put first."""
    return (error.strerror or str(error)).lower()


def is_disk_full(error: BaseException) -> bool:
    """True if the cause of an error is a disk, or a user's quota of it, that has no room left."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
