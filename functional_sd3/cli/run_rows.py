"""Rows of a run's log as lines: losses, rates, how long the rest takes, and what was validated."""

import math
import time
from collections.abc import Callable

from functional_sd3.training import tensorboard, validation

OnRow = Callable[[int, dict[str, float]], None]
Say = Callable[[str], None]


def writer(say: Say, print_row: OnRow | None, board: tensorboard.Writer | None) -> OnRow:
    """Prints what is validated, and passes every row on: to a line and to TensorBoard where they are wanted."""

    def on_row(step: int, row: dict[str, float]) -> None:
        if print_row is not None:
            print_row(step, row)
        if math.isfinite(row.get("validation", math.nan)):
            names = zip(validation.TIMES, validation.NAMES[1:], strict=True)
            at_times = ", ".join(f"{time:.2f}: {row[name]:.4f}" for time, name in names)
            say(f"validation at step {step}: {row['validation']:.4f}; by t {at_times}")
        if board is not None:
            board.row(step, row)

    return on_row


def printer(say: Say, first_step: int, steps: int) -> OnRow:
    """Prints a line for every row of the log: the loss, the rate, and how long the rest takes."""
    started = time.monotonic()
    flat: list[int] = []

    def on_row(step: int, row: dict[str, float]) -> None:
        seconds = (time.monotonic() - started) / max(step - first_step, 1)
        left = time.strftime("%H:%M:%S", time.gmtime(seconds * (steps - step)))
        shown = [f"{name} {row[name]:.3g}" for name in ("reward", "spread", "kl", "rate") if name in row]
        words = [f"loss {row['loss']:.4f}", *shown, f"{1 / seconds:.3g} steps/s", f"{left} left"]
        say(f"step {step} of {steps}: {', '.join(words)}")
        if row.get("spread") == 0 and not flat:
            flat.append(step)
            say(
                "note: the rewards of every group were equal, so nothing was learned: a reward with more grades, a "
                "larger --group or more --draws find differences"
            )

    return on_row
