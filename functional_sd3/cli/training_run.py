"""A training run of `train`, `reward` or `distill`: its folder, checkpoints, samples and messages, and how it ends."""

import argparse
import contextlib
import functools
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from functional_sd3 import lora, weights
from functional_sd3.cli import report, restarts, run_rows, train_checks, train_model
from functional_sd3.core import tree
from functional_sd3.formats import files
from functional_sd3.formats.errors import WeightsError
from functional_sd3.image import pixels
from functional_sd3.layouts.components import SPECS
from functional_sd3.parallel.mesh import Mesh
from functional_sd3.parallel.processes import ALONE, Processes
from functional_sd3.training import checkpoint, continuing, interruption, lock, loop, tensorboard
from functional_sd3.training.following import Following
from functional_sd3.training.rewards import RewardError
from functional_sd3.weights.model import Model

LORA = "pytorch_lora_weights.safetensors"
"""The name under which diffusers finds a LoRA in a folder."""
RESULTS = "results"
"""The folder of the results on the way, each in one of its own, named by its step."""
Say = Callable[[str], None]
State = Any


class Setup(NamedTuple):
    """The parts of a training run.

    task: `tasks.TrainingTask`, `reward_task.RewardTask` or `distill_task.DistillTask`. stored: the model as its files
    have it. settings: what its checkpoints keep. differences: of the settings of a checkpoint from these. lora: whether
    a LoRA is trained. lora_metadata: of its file.
    save: folder, state -> what is written of it, where that is neither a model nor a LoRA.
    step_note: a sentence on another number of steps than the checkpoint's settings planned, None for none.
    rest: the components of the stored model that the run does not need, read when the result is written.
    """

    task: Any
    stored: Model
    settings: dict[str, Any]
    differences: Callable[[dict[str, Any]], list[continuing.Difference]]
    lora: bool
    step_note: Callable[[dict[str, Any], State], str | None]
    lora_metadata: dict[str, str] = {}
    rest: Callable[[], dict[str, Any]] = dict
    save: Callable[[Path, State], Path] | None = None


def steps_note(steps: int, saved: dict[str, Any], state: State) -> str | None:
    """`Setup.step_note` of a run to `steps`; None where it is the number that was planned, or is done already."""
    before = saved.get("steps")
    if not isinstance(before, int) or before == steps or int(state.step) >= steps:
        return None
    return f"note: {before} steps were planned, now {steps}"


@contextlib.contextmanager
def hold(arguments: argparse.Namespace, processes: Processes = ALONE) -> Iterator[None]:
    """Context in which --out is these processes' alone; a signal before the first step ends it as Ctrl-C does.

    A restart by torchrun sets --resume where its own run has a checkpoint. Raises ValueError where --out holds no run
    to resume, one that is not to be, or what no run left there.
    """
    with interruption.terminated_like_interrupted(), contextlib.ExitStack() as stack:

        def enter() -> bool:
            out = Path(arguments.out)
            stack.enter_context(lock.hold(out, say))
            if restarts.is_restart(out) and has_checkpoint(out / "checkpoints"):
                say("started again by torchrun")
                arguments.resume = True
            train_checks.check_folder(arguments)
            restarts.begin(out)
            return arguments.resume

        arguments.resume = processes.first(enter)
        yield


def run(arguments: argparse.Namespace, setup: Setup, processes: Processes = ALONE) -> int:
    """Train and write the result; the exit status. Reads the options of paths, lengths and intervals.

    processes: that call this together; the first one writes.
    """
    out, checkpoints = Path(arguments.out), Path(arguments.out) / "checkpoints"
    task, state = setup.task, setup.task.state
    whole = task.whole if hasattr(task, "whole") else lambda state: state
    placements = _placements(setup)
    if arguments.resume:
        state = resume(arguments, setup, processes)
    first_step = int(state.step)
    needed = train_checks.KEPT_AT_ONCE * checkpoint.nbytes(state, placements, processes.mesh)
    result, every = _result_bytes(state, setup, processes.mesh), arguments.result_every
    results = 1 + (arguments.steps // every - first_step // every if every else 0)
    processes.first(lambda: train_checks.check_disk(out, needed, result, results))
    samples = out / "samples"

    has_board = processes.is_first and getattr(arguments, "tensorboard", False)
    board = tensorboard.open_writer(out, first_step) if has_board else None

    def on_sample(current, done: int) -> None:
        images = task.sample(current)
        if not processes.is_first:
            return
        save_image(samples / f"{done:08d}.png", images)
        if board is not None:
            board.image(done, images)

    def on_result(current, done: int) -> None:
        processes.first(lambda: _keep_result(out / RESULTS / f"{done:08d}", current, done, setup, checkpoints))

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
            result_every=arguments.result_every,
            on_result=on_result,
            rollout=getattr(task, "rollout", None),
            unchanged_by=(RewardError,),
            validate=getattr(task, "validate", None),
            validate_every=getattr(arguments, "validate_every", 0),
            has_sample=lambda done: (samples / f"{done:08d}.png").exists(),
            keep=train_checks.KEEP,
            progress=progress,
            on_row=run_rows.writer(
                say, None if progress else run_rows.printer(say, first_step, arguments.steps), board
            ),
            note=say,
            processes=processes,
            whole=whole,
            placements=placements,
            samples_together=getattr(task, "samples_together", False),
        )
    except KeyboardInterrupt:
        say(f"stopped at once; {train_checks.newest_checkpoint(arguments.out)}")
        return 130
    except loop.UnsavedError as error:  # In the first process alone; `state` is whole.
        if int(error.state.step) == arguments.steps:
            _save_unsaved(error, out, setup)
        raise
    except loop.DivergedError as error:
        if has_checkpoint(checkpoints):
            lower = f"--lr {arguments.lr / 10:g} --resume --force"
            raise loop.DivergedError(f"{error} {lower} goes on from there with one.") from error
        raise
    done = int(outcome.state.step)
    if outcome.reason == "interrupted":
        if not done:
            say("stopped before the first step; nothing is saved")
        else:
            say(f"stopped at step {done}, saved in {checkpoints}; the same command with --resume goes on")
        return 130
    if done == first_step:
        say(f"all {done} steps were done before: only the result is written again; a larger --steps goes on")
    try:
        report.say(processes.first(lambda: save_result(out, _averaged(outcome.state, setup, checkpoints), setup)))
    except KeyboardInterrupt:
        say(f"stopped while the result was written; step {done} is saved, and the same command with --resume goes on")
        return 130
    except ValueError as error:
        saved = f"step {done} is saved in {checkpoints}; the same command with --resume writes the result"
        raise type(error)(f"{error}. {saved}") from error
    if processes.is_first:
        restarts.end(out)
    return 0


def _result_bytes(state: State, setup: Setup, mesh: Mesh) -> int:
    """Bytes of the result on the disk, at most: of the model, or of the averages of what learns beside it."""
    if not setup.lora and setup.save is None:
        return tree.nbytes(setup.stored.params)
    train, placements = (state.train if isinstance(state, Following) else state), _placements(setup)
    if placements is not None:
        placements = (placements.train if isinstance(state, Following) else placements).ema
    return checkpoint.nbytes(train.ema, placements, mesh)


def _keep_result(folder: Path, state: State, done: int, setup: Setup, checkpoints: Path) -> None:
    """Write the result as it is after `done` steps; a failure is noted and does not end the run."""
    try:
        save_result(folder, _averaged(state, setup, checkpoints), setup)
    except (ValueError, OSError) as error:
        say(f"note: no result of step {done}: {error}. Training goes on")


def _save_unsaved(error, out: Path, setup) -> None:
    """Write the result of a run that is done but for its last checkpoint, which takes several times the room."""
    with contextlib.suppress(WeightsError):
        written = save_result(out, error.state, setup)
        say(f"note: the result of all steps is written to {written}; without their checkpoint no run goes on from it")


def say(text: str) -> None:
    """Lines on standard error, above the progress bar; a run continues after their reader has ended."""
    from tqdm import tqdm

    if sys.stderr is None:
        return
    with contextlib.suppress(OSError, ValueError), tqdm.external_write_mode(file=sys.stderr):
        for line in text.splitlines():
            report.message(line)


def resume(arguments: argparse.Namespace, setup: Setup, processes: Processes = ALONE) -> State:
    """The state of the newest checkpoint that can be read; notes name changed settings and checkpoints that are passed
    over.

    Raises ValueError where the settings differ and may not, WeightsError where there is no checkpoint that can be read.
    """
    folder, task = Path(arguments.out) / "checkpoints", setup.task
    allowed = lambda saved: continuing.check(setup.differences(saved), arguments.out, force=arguments.force)  # noqa: E731
    resumed = checkpoint.load_newest(folder, task.state, allowed, placements=_placements(setup), processes=processes)
    for path, error in resumed.passed_over:
        aside = processes.first(functools.partial(checkpoint.set_aside, path))
        say(f"note: a checkpoint cannot be read: {error}")
        say(f"note: it is set aside as {aside}, and the one before is taken: {resumed.path.name}")
    for sentence in continuing.notes(setup.differences(resumed.settings), resumed.settings, setup.settings):
        say(f"note: {sentence}")
    say(f"resuming at step {int(resumed.state.step)} of {arguments.steps}")
    if note := setup.step_note(resumed.settings, resumed.state):
        say(note)
    return resumed.state


def _placements(setup: Setup) -> Any:
    """Placements of the leaves of a state of which each process has its part; None where each has all."""
    return getattr(setup.task, "placements", None)


def _averaged(state: State, setup: Setup, checkpoints: Path) -> State:
    """The state with the average of the parameters alone, whole, in the dtypes in which it is saved.

    Where each process has its part it is put together from the newest checkpoint, which holds this state, so that no
    process has the whole in memory.
    """
    if _placements(setup) is None:
        return state
    casters = {name: train_model.stored_caster(setup.stored.params[name]) for name in setup.task.trained}

    def cast(path: str, leaf: torch.Tensor) -> torch.Tensor:
        component, _, rest = path.partition(".")
        return casters[component](rest, leaf) if component in casters else leaf

    is_following = isinstance(state, Following)
    train, under = (state.train, "train.ema") if is_following else (state, "ema")
    ema = checkpoint.whole(checkpoint.paths(checkpoints)[-1], under, train.ema, cast)
    train = train._replace(params={}, optimizer={}, ema=ema)
    return state._replace(train=train) if is_following else train


def has_checkpoint(folder: Path) -> bool:
    return bool(checkpoint.paths(folder))


def save_image(path: Path, images: torch.Tensor) -> None:
    """Write images (batch, 3, height, width) in [0, 1] as one PNG, four a row."""
    buffer = io.BytesIO()
    pixels.to_pil(pixels.grid(images.cpu(), columns=4))[0].save(buffer, format="PNG")
    files.write_atomic(path, buffer.getvalue())


def save_result(out: Path, state: State, setup: Setup) -> Path:
    """Write the LoRA, or the whole model: what was trained in the dtypes it was stored in, the rest as it was stored.

    Returns what was written.
    """
    if setup.save is not None:
        return setup.save(out, state)
    if setup.lora:
        # Parameters that an objective learns for itself are no part of the model.
        adapters = {name: part for name, part in state.ema.items() if name in SPECS}
        lora.save(out / LORA, adapters, metadata=setup.lora_metadata, differences=True)
        return out / LORA
    trained, stored = setup.task.model(state), setup.stored
    params = {name: train_model.as_stored(trained.params[name], stored.params[name]) for name in setup.task.trained}
    weights.save(out, stored._replace(config=trained.config, params={**setup.rest(), **stored.params, **params}))
    network = trained.config.transformer
    if network is not None and network.interval_size:
        say("note: diffusers has no embedder of t - r, so it cannot load this transformer; this program can")
    return out


def check_continuing(
    arguments: argparse.Namespace, differences: Callable[[dict[str, Any]], list[continuing.Difference]]
) -> None:
    """Before anything is encoded or drawn: the settings of the newest checkpoint, where they can be read.

    Raises ValueError where they differ and may not.
    """
    for path in reversed(checkpoint.paths(Path(arguments.out) / "checkpoints")):
        try:
            saved = checkpoint.settings(path)
        except WeightsError:
            continue
        continuing.check(differences(saved), arguments.out, force=arguments.force)
        return
