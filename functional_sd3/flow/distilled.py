"""Grids of distilled models: which kinds of them there are, and in how many steps one can be drawn."""

from collections.abc import Sequence

KINDS = ("segments", "meanflow", "consistency", "reflow")
"""What a distilled model's velocity is: the mean one to the next of `distilled_steps` fixed times; the mean one to any
earlier time; the mean one to time 0; that of each time of a flow whose paths are nearly straight."""


def check(steps: int | None, kind: str | None, spacings: Sequence[str]) -> None:
    """Raise ValueError for fields of a scheduler config that do not go together; spacings: names of those in use."""
    if (steps is None) != (kind is None):
        raise ValueError(f"distilled_steps {steps} and distillation {kind!r} go together: set both or neither")
    if kind is None:
        return
    if kind not in KINDS:
        raise ValueError(f"distillation {kind!r} must be one of {', '.join(KINDS)}")
    if spacings:
        raise ValueError(f"a distilled model has the grid even(steps, shift): {', '.join(spacings)} must not be set")


def check_steps(kind: str | None, distilled: int, steps: int) -> None:
    """Raise ValueError where a model of `distilled` segments would be evaluated at times it was not trained at."""
    if kind == "segments" and distilled % steps:
        fewer = [str(number) for number in range(1, distilled) if distilled % number == 0]
        less = f"; less well in {' or '.join(fewer)}" if fewer else ""
        raise ValueError(
            f"steps {steps}: this model was distilled into {distilled} segments, so it is drawn in steps={distilled}, "
            f"and with cfg=1 where guidance is folded in{less}. At the times of other grids it was not trained"
        )
