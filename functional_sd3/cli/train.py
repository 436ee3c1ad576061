"""Train a part of a model on a folder of images, or on the world of shapes."""

import argparse
import contextlib
import sys
from pathlib import Path

from functional_sd3.cli import report
from functional_sd3.cli.train_options import add_arguments

__all__ = ["HELP", "add_arguments", "run"]

HELP = "train the transformer or the autoencoder of a model, or a LoRA"
KEEP = 3
"""Checkpoints kept."""
LORA = "pytorch_lora_weights.safetensors"
"""The name under which diffusers finds a LoRA in a folder."""


def run(arguments: argparse.Namespace) -> int:
    from functional_sd3.cli import train_checks
    from functional_sd3.training import interruption, lock

    train_checks.check(arguments)
    with interruption.terminated_like_interrupted(), lock.hold(arguments.out, _say):
        train_checks.check_folder(arguments)
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from functional_sd3.cli import train_checks, train_setup
    from functional_sd3.training import loop

    out, checkpoints = Path(arguments.out), Path(arguments.out) / "checkpoints"
    setup = train_setup.prepare(arguments, _say)
    task, state = setup.task, setup.task.state
    train_checks.check_disk(out, state, setup.stored, KEEP)
    if arguments.resume:
        state = train_setup.resume(arguments, setup, _say)
    first_step = int(state.step)
    samples = out / "samples"

    def on_sample(current, done: int) -> None:
        train_setup.save_image(samples / f"{done:08d}.png", task.sample(current))

    progress = report.has_bars()
    try:
        outcome = loop.run(
            state,
            task.train_step,
            task.batch,
            steps=arguments.steps,
            out=out,
            settings=setup.settings,
            save_every=arguments.save_every,
            log_every=arguments.log_every,
            sample_every=arguments.sample_every,
            on_sample=on_sample if arguments.sample_every else None,
            has_sample=lambda done: (samples / f"{done:08d}.png").exists(),
            keep=KEEP,
            progress=progress,
            on_row=None if progress else _row_printer(first_step, arguments.steps),
            note=_say,
        )
    except KeyboardInterrupt:
        _say(f"stopped without saving the last steps; {train_setup.newest(checkpoints)}")
        return 130
    except loop.UnsavedError as error:
        if int(error.state.step) == arguments.steps:
            _save_unsaved(error, out, setup)
        raise
    except loop.DivergedError as error:
        if train_setup.has_checkpoint(checkpoints):
            lower = f"--lr {arguments.lr / 10:g} --resume --force"
            raise loop.DivergedError(f"{error} {lower} goes on from there with one.") from error
        raise
    done = int(outcome.state.step)
    if outcome.reason == "interrupted":
        if not done:
            _say("stopped before the first step; nothing is saved")
        else:
            _say(f"stopped at step {done}, saved in {checkpoints}; the same command with --resume goes on")
        return 130
    if done == first_step:
        _say(f"all {done} steps were done before: only the result is written again; a larger --steps goes on")
    try:
        report.say(train_setup.save_result(out, outcome.state, setup, LORA))
    except KeyboardInterrupt:
        _say(f"stopped while the result was written; step {done} is saved, and the same command with --resume goes on")
        return 130
    except ValueError as error:
        saved = f"step {done} is saved in {checkpoints}; the same command with --resume writes the result"
        raise type(error)(f"{error}. {saved}") from error
    return 0


def _save_unsaved(error, out: Path, setup) -> None:
    """Write the result of a run that is done but for its last checkpoint, which takes several times the room."""
    from functional_sd3.cli import train_setup
    from functional_sd3.formats.errors import WeightsError

    with contextlib.suppress(WeightsError):
        written = train_setup.save_result(out, error.state, setup, LORA)
        _say(f"note: the result of all steps is written to {written}; without their checkpoint no run goes on from it")


def _row_printer(first_step: int, steps: int):
    """Prints a line for every row of the log: the loss, the rate, and how long the rest takes."""
    import time

    started = time.monotonic()

    def on_row(step: int, row: dict[str, float]) -> None:
        seconds = (time.monotonic() - started) / max(step - first_step, 1)
        left = time.strftime("%H:%M:%S", time.gmtime(seconds * (steps - step)))
        rate = f", rate {row['rate']:.3g}" if "rate" in row else ""
        _say(f"step {step} of {steps}: loss {row['loss']:.4f}{rate}, {1 / seconds:.3g} steps/s, {left} left")

    return on_row


def _say(text: str) -> None:
    """Lines on standard error, above the progress bar; a run goes on where nobody reads them any more."""
    from tqdm import tqdm

    if sys.stderr is None:
        return
    with contextlib.suppress(OSError, ValueError), tqdm.external_write_mode(file=sys.stderr):
        for line in text.splitlines():
            report.message(line)
