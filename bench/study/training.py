"""A run of the study: the task of its command, trained for a budget of CPU time and resumable at any moment.

What is trained is what `functional-sd3 reward` or `distill` would train with the same words. Only the end differs, CPU
seconds and not steps: those of this process in rollouts and updates, on as many threads as it has.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from functional_sd3.cli import distill_setup, parser, reward_checks, reward_setup, train_checks, train_setup
from functional_sd3.cli.training_run import Setup, save_result, say
from functional_sd3.training import checkpoint, interruption, log, loop, recorder

SAVE_SECONDS = 60.0
"""CPU seconds between checkpoints: what a kill may lose."""
NO_MARK = -1.0
"""Of a checkpoint between two marks."""
OnMark = Callable[[float, float, int, Any], None]
"""`(mark, seconds spent, updates done, state)`."""


def prepare(words: Sequence[str]) -> Setup:
    """The task of a command line of `train`, `reward` or `distill`, as the command itself makes it."""
    arguments = parser.parse(words).options
    if arguments.subcommand == "reward":
        reward_checks.check(arguments)
        return reward_setup.prepare(arguments)
    if arguments.subcommand == "distill":
        distill_setup.check(arguments)
        return distill_setup.prepare(arguments, say)
    train_checks.check(arguments)
    return train_setup.prepare(arguments, say)


def advance(
    setup: Setup, folder: Path, marks: Sequence[float], on_mark: OnMark, *, save_seconds: float = SAVE_SECONDS
) -> bool:
    """Train to the last of `marks`, CPU seconds in rising order; false where a signal stopped the run before.

    `on_mark` is called at each with the state at the end of the update that reached it, which is saved before. The
    last model is then written to the folder. Raises DivergedError where the loss or the state is not finite.
    """
    checkpoints, task = folder / "checkpoints", setup.task
    state, spent, reached = task.state, 0.0, NO_MARK
    if checkpoint.paths(checkpoints):
        resumed = checkpoint.load_newest(checkpoints, task.state, lambda settings: _check(setup, settings, folder))
        state, spent = resumed.state, float(resumed.settings["cpu_seconds"])
        # Killed while its model was measured: the state is still the one of that mark.
        reached = float(resumed.settings["mark"])
    done, saved = int(state.step), spent
    # Marks before the checkpoint's were measured before it was written.
    marks = [mark for mark in marks if mark > spent or mark == reached]
    table = recorder.Recorder(log.resume(folder / "log.csv", done), checkpoints, done, loop.columns, None, say)

    def save(mark: float) -> float:
        table.write(done, durable=True)
        if problem := checkpoint.not_finite(state):
            raise recorder.diverged(problem, done, checkpoints)
        checkpoint.save(checkpoints, done, state, {**setup.settings, "cpu_seconds": spent, "mark": mark})
        checkpoint.prune(checkpoints, checkpoint.MIN_KEPT)
        return spent

    with interruption.catch() as stop:
        for mark in marks:
            while spent < mark:
                begun = time.process_time()
                batch = _abandoned_on_a_signal(stop, next_batch, task, state, done)
                if stop.is_requested():
                    save(NO_MARK)
                    return False
                state, metrics = task.train_step(state, batch)
                spent, done = spent + time.process_time() - begun, done + 1
                table.add(metrics)
                if spent >= saved + save_seconds and spent < mark:
                    saved = save(NO_MARK)
            if mark != reached:
                saved = save(mark)
            _abandoned_on_a_signal(stop, on_mark, mark, spent, done, state)
            if stop.is_requested():
                return False
    save_result(folder, state, setup)
    return True


def next_batch(task: Any, state: Any, number: int) -> Any:
    """What the step of a task takes: a batch, or the rollout that draws it."""
    batch, rollout = task.batch(number), getattr(task, "rollout", None)
    return batch if rollout is None else rollout(state, batch)


def _abandoned_on_a_signal(stop: interruption.Interruption, run: Callable[..., Any], *arguments: Any) -> Any:
    """What `run` returns; None where a signal ended it, which `stop` then knows."""
    try:
        with stop.abortable():
            return None if stop.is_requested() else run(*arguments)
    except KeyboardInterrupt:
        if not stop.is_requested():
            raise
        return None


def _check(setup: Setup, saved: dict[str, Any], folder: Path) -> None:
    own = {name: value for name, value in saved.items() if name not in ("cpu_seconds", "mark")}
    if changes := setup.differences(own):
        listed = "; ".join(map(str, changes))
        raise ValueError(f"the run in {folder} was started with other settings: {listed}. Remove it, or restore them")
