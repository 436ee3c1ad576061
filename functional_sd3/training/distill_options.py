"""Options of some methods of distillation alone: one description for `Settings`, the methods and the command line.

This module imports no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Option(NamedTuple):
    """An option: its type, its default by method, which are those that have it, what it is, and a word for its value.

    A bool is switched on by its name alone.
    """

    kind: type
    defaults: Mapping[str, Any]
    help: str
    metavar: str = "N"


METHODS = ("segments", "meanflow", "imeanflow", "shortcut", "scm", "rcm", "reflow")
"""Names of `distill_methods.METHODS`."""
OPTIONS: dict[str, Option] = {
    "inner": Option(int, {"segments": 3}, "steps of the teacher in each of the student's"),
    "equal": Option(
        float,
        {"meanflow": 0.5, "imeanflow": 0.5, "shortcut": 0.875},
        "part of a batch that learns the velocity at one time, r = t",
        "SHARE",
    ),
    "tangent_warmup": Option(
        int,
        {"meanflow": 0, "imeanflow": 0, "scm": 50, "rcm": 50},
        "updates over which the part of the target that needs a derivative grows to its size",
    ),
    "log_variance": Option(
        bool, {"scm": False}, "learn the logarithm of the loss's variance at each time, and weight by it (EDM2, sCM)"
    ),
    "fake_updates": Option(int, {"rcm": 4}, "updates of the fake score for each of the student's"),
    "fake_rate": Option(float, {"rcm": 0.2}, "learning rate of the fake score, as part of the student's", "FACTOR"),
    "teacher_steps": Option(int, {"reflow": 28}, "steps of the teacher's runs that end its pairs"),
}
"""Name -> option; fields of `distill_methods.Settings`."""


def listed(names: Sequence[str]) -> str:
    """ "a", "a or b", "a, b or c"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def own_defaults(method: str) -> dict[str, Any]:
    """The options of a method with their defaults."""
    return {name: option.defaults[method] for name, option in OPTIONS.items() if method in option.defaults}


def foreign(method: str, given: Mapping[str, Any]) -> list[str]:
    """The names of options that are given, not None, and are of other methods alone."""
    return [name for name, option in OPTIONS.items() if given[name] is not None and method not in option.defaults]
