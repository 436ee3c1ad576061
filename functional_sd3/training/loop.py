"""The loop around a training step: what it reads, logs, saves and how it stops.

A run is a function of its first state and of `batch_of_step`, itself a function of the step's number: nothing else is
remembered. So a run that was killed goes on from its last checkpoint to the very same bits.
"""

import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import prng, tree
from functional_sd3.core.types import Key, Tree
from functional_sd3.training import checkpoint, log
from functional_sd3.training.step import Metrics, TrainState


class DivergedError(ArithmeticError):
    """The loss or the gradient is no longer a finite number."""


class Outcome(NamedTuple):
    """The last state, and whether all steps were done or the person stopped the run (its state is saved either way)."""

    state: TrainState
    reason: Literal["done", "interrupted"]


def run(
    state: TrainState,
    train_step: Callable[[TrainState, Tree], tuple[TrainState, Metrics]],
    batch_of_step: Callable[[int], Tree],
    *,
    steps: int,
    out: Path,
    settings: dict[str, Any] | None = None,
    save_every: int = 500,
    log_every: int = 20,
    sample_every: int = 0,
    on_sample: Callable[[TrainState, int], None] | None = None,
    keep: int = 3,
    progress: bool = True,
    summary: Callable[[dict[str, list[float] | float]], dict[str, float]] | None = None,
) -> Outcome:
    """Train until `state.step` is `steps`, from wherever it stands.

    Writes OUT/checkpoints (the last `keep`, every `save_every` steps and at the end) and OUT/log.csv, a row every
    `log_every` steps with the means of the metrics since the row before, by way of `summary` (default `columns`).
    `on_sample` is called every `sample_every` steps and at the end. Ctrl-C or SIGTERM finish the step at hand, save and
    return. Raises DivergedError at a loss or gradient that is not finite, leaving the last good checkpoint, and
    WeightsError when the disk refuses.
    """
    from tqdm import tqdm

    done, folder, sums, since = int(state.step), Path(out) / "checkpoints", None, 0
    table = log.resume(Path(out) / "log.csv", done)
    started = time.monotonic()
    with _stop_on_signal() as stopped, tqdm(initial=done, total=steps, disable=not progress, dynamic_ncols=True) as bar:
        while done < steps and not stopped():
            state, metrics = train_step(state, batch_of_step(done))
            sums = metrics if sums is None else tree.map(torch.add, sums, metrics)
            done, since = done + 1, since + 1
            last = done == steps or stopped()
            saves = last or done % save_every == 0
            # A row before every checkpoint: a resumed run starts its means afresh there, as this one does.
            if saves or done % log_every == 0:
                means = {name: (value / since).tolist() for name, value in sums.items()}
                _check_finite(means, done, folder)
                elapsed = time.monotonic() - started
                table = log.append(table, done, (summary or columns)(means), elapsed, durable=saves)
                bar.set_postfix_str(f"loss {means['loss']:.4f}", refresh=False)
                sums, since = None, 0
            if saves:
                checkpoint.save(folder, done, state, settings or {})
                checkpoint.prune(folder, keep)
            bar.update()
            if on_sample and (done == steps or (sample_every and done % sample_every == 0)):
                on_sample(state, done)
    return Outcome(state, "done" if done >= steps else "interrupted")


def order(key: Key, batch: int, size: int) -> Callable[[int], Tensor]:
    """step -> the indices of its batch, int64 (batch,): every epoch is a permutation of range(size) by its own key.

    A batch that reaches the end of an epoch goes on into the next, so that none is ever short. The answers depend on
    the step alone; the order of the epoch at hand is kept, as drawing it costs as much as many steps.
    """

    @functools.lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> Tensor:
        return prng.permutation(prng.fold_in(key, epoch), size)

    def indices(step: int) -> Tensor:
        first, last = step * batch // size, ((step + 1) * batch - 1) // size
        orders = torch.cat([epoch_order(epoch) for epoch in range(first, last + 1)])
        return orders[step * batch - first * size :][:batch]

    return indices


def columns(means: dict[str, list[float] | float]) -> dict[str, float]:
    """Metrics as columns: vectors are numbered; bin_loss over bin_share is each bin's own loss, from `bin_0` on."""
    means = dict(means)
    shares, losses = means.pop("bin_share", []), means.pop("bin_loss", [])
    row: dict[str, float] = {}
    for name, value in means.items():
        parts = enumerate(value) if isinstance(value, list) else ()
        row |= {f"{name}_{index}": part for index, part in parts} or {name: value}
    bins = zip(losses, shares, strict=True)
    return row | {f"bin_{index}": loss / share if share else math.nan for index, (loss, share) in enumerate(bins)}


def _check_finite(means: dict[str, Any], step: int, folder: Path) -> None:
    for name in ("loss", "grad_norm"):
        if name in means and not math.isfinite(means[name]):
            saved = checkpoint.found(folder)
            kept = f"the last good state is {saved[-1]}" if saved else "nothing was saved yet"
            raise DivergedError(
                f"{name} is {means[name]} at step {step}, so training stopped; {kept}. Try a lower learning rate."
            )


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """A flag that the first Ctrl-C or SIGTERM raises; a step is never cut in two, since a donated one would be lost.

    The second signal does what it always does.
    """
    caught = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield caught.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        caught.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield caught.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
