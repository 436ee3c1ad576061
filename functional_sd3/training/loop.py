"""The training loop: batches, log, checkpoints, samples and interruption.

A run is a function of its first state and of `batch_of_step`, a function of the step's number. So a killed run is
resumed from its last checkpoint bit for bit as if it had not been killed.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key, Tree
from functional_sd3.formats.errors import WeightsError, is_disk_full
from functional_sd3.parallel.processes import ALONE, Processes
from functional_sd3.training import checkpoint, interruption, log, validation
from functional_sd3.training.interruption import Interruption
from functional_sd3.training.objectives.types import Metrics
from functional_sd3.training.recorder import DivergedError, Recorder, Row, Summary, columns, diverged


class State(Protocol):
    """A tree of tensors with the number of steps done, int64 ()."""

    @property
    def step(self) -> Tensor: ...


S = TypeVar("S", bound=State)
Sampler = Callable[[S, int], None]
Note = Callable[[str], None]
__all__ = ["DivergedError", "Outcome", "UnsavedError", "columns", "order", "print_note", "run"]


def print_note(text: str) -> None:
    """Print a line on standard error, above a progress bar if there is one; nothing if that stream is closed."""
    from tqdm import tqdm

    with contextlib.suppress(OSError, ValueError):
        tqdm.write(text, file=sys.stderr)


class UnsavedError(WeightsError):
    """The last checkpoint of a run cannot be written; `state` is the state that it would have held."""

    state: Any


class Outcome(NamedTuple, Generic[S]):
    """The last state, which is saved, and whether all steps were done or a signal stopped the run."""

    state: S
    reason: Literal["done", "interrupted"]


def run(
    state: S,
    train_step: Callable[[S, Any], tuple[S, Any]],
    batch_of_step: Callable[[int], Tree],
    *,
    steps: int,
    out: Path,
    settings: dict[str, Any] | None = None,
    save_every: int = 500,
    log_every: int = 20,
    sample_every: int = 0,
    on_sample: Sampler[S] | None = None,
    result_every: int = 0,
    on_result: Sampler[S] | None = None,
    rollout: Callable[[S, Tree], Any] | None = None,
    unchanged_by: tuple[type[Exception], ...] = (),
    validate: Callable[[S], Metrics] | None = None,
    validate_every: int = 0,
    has_sample: Callable[[int], bool] = lambda step: True,
    keep: int = 3,
    progress: bool = True,
    on_row: Callable[[int, Row], None] | None = None,
    note: Note = print_note,
    summary: Summary | None = None,
    processes: Processes = ALONE,
    whole: Callable[[S], S] = lambda state: state,
    placements: Tree | None = None,
    samples_together: bool = False,
) -> Outcome[S]:
    """Train from `state` until `state.step` is `steps`.

    Writes OUT/checkpoints (the last `keep`, at least two, every `save_every` steps and at the end) and OUT/log.csv, a
    row every `log_every` steps with the means of the metrics since the row before, by way of `summary` (default
    `columns`); `on_row` is called with each. `on_sample` is called every `sample_every` steps and at the end, and
    before the first step where the sample of the initial state is due and `has_sample(step)` is false. `on_result` is
    called by all processes every `result_every` steps, after the checkpoint of that step is written, and before the
    first step of a run resumed from it, which may have been killed in between. rollout:
    `rollout(state, batch)` is what `train_step` takes in place of the batch: data drawn by the trained model.
    unchanged_by: errors of `train_step` that leave the state it was given as it was. validate: the columns
    `validation.NAMES` of a state, every `validate_every` steps, where a row is written too, and at the end.

    Ctrl-C, SIGTERM or SIGHUP let the current step finish, or abandon the current sample or rollout, save and return; a
    third Ctrl-C raises KeyboardInterrupt. A batch or rollout that fails ends the run after its state is saved. A
    sample, a row or a checkpoint that cannot be written is reported by `note`, and the run continues, unless it is the
    last checkpoint. Raises DivergedError at a loss, gradient or state that is not finite, leaving the last good
    checkpoint, and UnsavedError when the disk refuses the last checkpoint.

    processes: of the run, which all call this; each writes what it owns of a checkpoint, and the first one the rest,
    and samples of `whole(state)`, the state put together, for which all of them are needed. placements: of the leaves
    of a state of which each has its part. samples_together: all of them call `on_sample` instead, each with its own
    state, and draw together; no signal ends that. A signal to one stops them all after the same step, and an error of
    one that is none of a training step ends them all, in the others as ElsewhereError; a rollout is not abandoned
    there.
    """
    from tqdm import tqdm

    done, folder = int(state.step), Path(out) / "checkpoints"
    table = processes.first(lambda: log.resume(Path(out) / "log.csv", done))
    own_table, own_row = (table, on_row) if processes.is_first else (None, None)
    own_note = note if processes.is_first else lambda text: None
    recorder = Recorder(own_table, folder, done, summary or columns, own_row, note)
    for step in processes.first(lambda: checkpoint.sweep(folder)):
        own_note(f"note: the write of the checkpoint of step {step} was broken off; what it left is removed")
    saved = done

    def is_sample_due() -> bool:
        return on_sample is not None and (done == steps or (sample_every > 0 and done % sample_every == 0))

    def is_result_due() -> bool:
        return result_every > 0 and done % result_every == 0

    def is_stopping() -> bool:
        """True if one process has received a signal to stop; a collective operation, so all processes must call it."""
        return processes.any(stop.is_requested())

    def save(final: bool) -> bool:
        processes.together(lambda: _check_finite(state, done, folder))
        try:
            return _save(folder, done, state, settings or {}, keep, own_note, final, placements, processes)
        except UnsavedError as error:
            error.state = whole(state)
            processes.fail(error)

    def sample() -> None:
        if samples_together:
            _sample(on_sample, state, done, stop, own_note, can_end=processes.is_alone)
            return
        complete = whole(state)
        if processes.is_first:
            _sample(on_sample, complete, done, stop, note)

    def write_row(durable: bool) -> float:
        return processes.together(lambda: recorder.write(done, durable=durable))

    def save_whole() -> None:
        """Save before an error: the state is complete, and the steps since the last checkpoint may be hours of work."""
        if done != saved:
            write_row(durable=True)
            save(final=True)

    processes.reached(done)
    with interruption.catch() as stop, tqdm(initial=done, total=steps, disable=not progress, dynamic_ncols=True) as bar:
        if done and is_sample_due() and not processes.first(lambda: has_sample(done)):
            sample()
        if done and is_result_due() and on_result is not None:
            on_result(state, done)
        while done < steps and not is_stopping():
            try:
                batch = processes.together(functools.partial(batch_of_step, done))
                if rollout is not None:
                    with stop.abortable() if processes.is_alone else contextlib.nullcontext():
                        batch = None if is_stopping() else rollout(state, batch)
            except BaseException:
                # A rollout may be ended by the signal that stops this run, with an error of its own.
                if is_stopping():
                    break
                save_whole()
                raise
            if rollout is not None and is_stopping():
                break
            try:
                state, metrics = train_step(state, batch)
            except unchanged_by:
                save_whole()
                raise
            done += 1
            processes.reached(done)
            validates = validate is not None and (done == steps or (validate_every > 0 and done % validate_every == 0))
            if validate is not None:
                metrics = {
                    **metrics,
                    **(_validation(validate, state, stop, processes) if validates else validation.ABSENT),
                }
            recorder.add(metrics)
            last = is_stopping() or done == steps
            saves = last or done % save_every == 0 or is_result_due()
            # A row before every checkpoint, where a resumed run restarts its means as this one does.
            if saves or validates or done % log_every == 0:
                bar.set_postfix_str(f"loss {write_row(durable=saves):.4f}", refresh=False)
            if saves and save(final=last):
                saved = done
                if is_result_due() and on_result is not None and not is_stopping():
                    on_result(state, done)
            bar.update()
            if is_sample_due() and not is_stopping():
                sample()
        if done != saved:
            # The signal came after this step's decision not to save.
            write_row(durable=True)
            save(final=True)
        return Outcome(state, "interrupted" if is_stopping() else "done")


def order(key: Key, batch: int, size: int) -> Callable[[int], Tensor]:
    """step -> indices of its batch, int64 (batch,); every epoch is a permutation of range(size) by its own key.

    A batch that reaches the end of an epoch continues with the next, so that all have the same size. Indices depend on
    the step alone; the permutations of two epochs are kept, since one costs as much as many steps.
    """

    @functools.lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> Tensor:
        return prng.permutation(prng.fold_in(key, epoch), size)

    def indices(step: int) -> Tensor:
        first, last = step * batch // size, ((step + 1) * batch - 1) // size
        orders = torch.cat([epoch_order(epoch) for epoch in range(first, last + 1)])
        return orders[step * batch - first * size :][:batch]

    return indices


def _check_finite(state: State, step: int, folder: Path) -> None:
    """Raises DivergedError where a leaf of this process's part of the state is not finite."""
    if problem := checkpoint.not_finite(state):
        raise diverged(problem, step, folder)


def _save(
    folder: Path,
    step: int,
    state: State,
    settings: dict[str, Any],
    keep: int,
    note: Note,
    final: bool,
    placements: Tree | None,
    processes: Processes,
) -> bool:
    """True if the checkpoint of `step` is on the disk, on all processes. Raises UnsavedError where `final`."""
    least = 1 if final else checkpoint.MIN_KEPT

    def attempt() -> WeightsError | None:
        try:
            checkpoint.save(folder, step, state, settings, placements=placements, processes=processes)
        except WeightsError as error:
            return error
        return None

    def has_made_room() -> bool:
        """True if checkpoints were deleted: on a full disk the oldest are, before this one is written instead of
        after."""
        has_more = len(checkpoint.paths(folder)) > least
        checkpoint.prune(folder, least)
        return has_more

    error = attempt()
    if error is not None and is_disk_full(error) and processes.first(has_made_room):
        error = attempt()
    if error is not None:
        return _unsaved(error, folder, step, note, final)
    processes.first(lambda: checkpoint.prune(folder, max(keep, checkpoint.MIN_KEPT)))
    return True


def _unsaved(error: Exception, folder: Path, step: int, note: Note, final: bool) -> bool:
    saved = [path.name for path in checkpoint.paths(folder)]
    newest = f"the newest one is {saved[-1]}" if saved else "there is none yet"
    message = f"the checkpoint of step {step} could not be written, {newest}: {error}"
    if final:
        raise UnsavedError(message) from error
    note(f"note: {message}. Training goes on and tries again at the next one")
    return False


def _validation(
    validate: Callable[[S], Metrics], state: S, stop: Interruption, processes: Processes
) -> Mapping[str, Any]:
    """The columns of a validation; absent ones where a signal ends it, as the run does with the step that is done."""
    if not processes.is_alone:
        return validate(state)
    try:
        with stop.abortable():
            return validation.ABSENT if stop.is_requested() else validate(state)
    except KeyboardInterrupt:
        return validation.ABSENT


def _sample(
    on_sample: Sampler[S] | None, state: S, done: int, stop: Interruption, note: Note, *, can_end: bool = True
) -> None:
    """Make a sample; errors are noted and signals end it, neither of which may end the run.

    can_end: False where other processes draw with this one, which a signal must not leave alone.
    """
    try:
        with stop.abortable() if can_end else contextlib.nullcontext():
            if on_sample is not None and not (can_end and stop.is_requested()):
                on_sample(state, done)
    except KeyboardInterrupt:
        pass
    except Exception as error:
        note(f"note: no sample of step {done}: {str(error) or type(error).__name__}")
