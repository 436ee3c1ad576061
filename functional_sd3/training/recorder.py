"""Rows of the log: means of a run's metrics, checked to be finite."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from functional_sd3.formats.errors import WeightsError
from functional_sd3.training import checkpoint, log

Row = dict[str, float]
Summary = Callable[[dict[str, list[float] | float]], Row]


class DivergedError(ArithmeticError):
    """The loss or the gradient is no longer a finite number."""


class Recorder:
    """Rows of the log: metrics summed since the row before, on their device until the row is written.

    table: the log; None where another process writes it, and metrics, the same on all, are checked alone.
    """

    def __init__(
        self,
        table: log.Log | None,
        folder: Path,
        done: int,
        summary: Summary,
        on_row: Callable[[int, Row], None] | None,
        note: Callable[[str], None],
    ) -> None:
        self._table, self._summary, self._on_row, self._note, self._folder = table, summary, on_row, note, folder
        self._sums: dict[str, tuple[Any, int]] = {}
        self._checked: list[dict[str, Tensor | float]] = []
        self._row = done
        self._started = time.monotonic()

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Add the metrics of a step; a metric that is a Python float, NaN, was not measured in it."""
        for name, value in metrics.items():
            added, count = self._sums.get(name, (math.nan, 0))
            if isinstance(value, Tensor):
                self._sums[name] = (added + value if count else value, count + 1)
            else:
                self._sums[name] = added, count
        self._checked.append({name: metrics[name] for name in ("loss", "grad_norm") if name in metrics})

    def write(self, done: int, *, durable: bool) -> float:
        """Write the row of step `done`, where steps were added since the last; returns their mean loss, else NaN.

        Raises DivergedError, naming the step, where a loss or a gradient is not finite.
        """
        count = len(self._checked)
        if not count:
            return math.nan
        means: dict[str, Any] = {
            name: (added / measured).tolist() if measured else added for name, (added, measured) in self._sums.items()
        }
        self._check_finite(means)
        row, elapsed = self._summary(means), time.monotonic() - self._started
        try:
            if self._table is not None:
                self._table = log.append(self._table, done, row, elapsed, durable=durable)
        except WeightsError as error:
            self._note(f"note: the row of step {done} is not in the log: {error}")
        if self._on_row:
            self._on_row(done, row)
        self._sums, self._checked, self._row = {}, [], done
        return means["loss"]

    def _check_finite(self, means: dict[str, Any]) -> None:
        for name in ("loss", "grad_norm"):
            if name in means and not math.isfinite(means[name]):
                values = [float(metrics[name]) for metrics in self._checked]
                # A sum of finite numbers may overflow; then the last one is named.
                index = next((i for i, value in enumerate(values) if not math.isfinite(value)), len(values) - 1)
                raise diverged(f"{name} is {values[index]}", self._row + index + 1, self._folder)


def diverged(what: str, step: int, folder: Path) -> DivergedError:
    """The error for a run that is not finite at `step`, naming its newest checkpoint in `folder`."""
    saved = checkpoint.paths(folder)
    newest = f"the last good state is {saved[-1]}" if saved else "nothing was saved yet"
    return DivergedError(f"{what} at step {step}, so training stopped; {newest}. Try a lower learning rate.")


def columns(means: dict[str, Any]) -> dict[str, float]:
    """Metrics as columns: entries of vectors are numbered; `bin_0` and on are bin_loss / bin_share, each bin's loss."""
    means = dict(means)
    shares, losses = means.pop("bin_share", []), means.pop("bin_loss", [])
    row: dict[str, float] = {}
    for name, value in means.items():
        parts = enumerate(value) if isinstance(value, list) else ()
        row |= {f"{name}_{index}": part for index, part in parts} or {name: value}
    bins = zip(losses, shares, strict=True)
    return row | {f"bin_{index}": loss / share if share else math.nan for index, (loss, share) in enumerate(bins)}
