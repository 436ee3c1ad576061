"""Grids of distilled models: which kinds of them there are, and in how many steps one can be drawn."""

from collections.abc import Sequence

KINDS = ("segments", "meanflow", "consistency", "reflow")
"""Velocity of a distilled model: the mean one to the next of `distilled_steps` fixed times; the mean one to any
earlier time; the mean one to time 0; that of each time of a flow whose paths are nearly straight."""


def check(steps: int | None, kind: str | None, trained: Sequence[int], spacings: Sequence[str]) -> None:
    """Raises ValueError for fields of a scheduler config that do not go together; spacings: names of those in use."""
    if (steps is None) != (kind is None):
        raise ValueError(f"distilled_steps {steps} and distillation {kind!r} go together: set both or neither")
    if trained and kind is None:
        raise ValueError(
            f"trained_steps {list(trained)} are of a distilled model: set distilled_steps and distillation"
        )
    if kind is None:
        return
    if kind not in KINDS:
        raise ValueError(f"distillation {kind!r} must be one of {', '.join(KINDS)}")
    if spacings:
        raise ValueError(f"a distilled model has the grid even(steps, shift): {', '.join(spacings)} must not be set")


def numbers_of_steps(distilled: int, trained: Sequence[int]) -> tuple[int, ...]:
    """Numbers of steps that a distilled model was trained to be drawn in, its default first."""
    return tuple(trained) or (distilled,)


def check_steps(kind: str | None, distilled: int, trained: Sequence[int], steps: int) -> None:
    """Raises ValueError where a model of segments would be evaluated at times that it was not trained at."""
    numbers = numbers_of_steps(distilled, trained)
    if kind == "segments" and all(number % steps for number in numbers):
        fewer = sorted({less for each in numbers for less in range(1, each) if each % less == 0} - {*numbers})
        less = f"; less well in {' or '.join(map(str, fewer))}" if fewer else ""
        raise ValueError(
            f"steps {steps}: this model was distilled into {distilled} segments, so it is drawn in "
            f"{' or '.join(map(str, numbers))} steps, and at a scale of 1 where guidance is folded in{less}. At the "
            "times of other grids it was not trained"
        )
