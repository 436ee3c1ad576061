"""Checks of a `train` command line, its data and its folder, before anything is loaded."""

import argparse
import importlib.util
import math
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from functional_sd3.cli import (
    memory_options,
    options,
    output,
    run_options,
    train_objective,
    train_subjects,
    view_options,
)

OURS = ("checkpoints", "samples", "results", "log.csv", "prior", "tensorboard")
"""Files in the folder of a run that has not ended."""
KEEP = 3
"""Checkpoints kept."""
KEPT_AT_ONCE = KEEP + 1
"""Checkpoints on the disk while one is written."""
_MIN = {
    "steps": 1,
    "batch_size": 1,
    "accumulate": 1,
    "warmup": 0,
    "save_every": 1,
    "log_every": 1,
    "sample_every": 0,
    "result_every": 0,
    "validate_every": 1,
}


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for an option, or options together, that make no sense, and for data that is not there."""
    for name, least in _MIN.items():
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least {least}")
    if not 0 < arguments.lr < math.inf:
        raise ValueError(f"--lr {arguments.lr} must be a positive number, such as 1e-4")
    for name in ("dropout", "ema"):
        if not 0 <= getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)} must be at least 0 and below 1")
    if arguments.batch_size % arguments.accumulate:
        raise ValueError(
            f"--batch-size {arguments.batch_size} cannot be taken in {arguments.accumulate} equal parts (--accumulate)"
        )
    if arguments.lora is not None and arguments.lora < 1:
        raise ValueError(f"--lora {arguments.lora} must be a rank of at least 1, such as 16; leave it out to train all")
    if arguments.lora and (arguments.scratch or arguments.part == "vae"):
        raise ValueError("--lora adapts a transformer that is there: neither --scratch nor --part vae goes with it")
    if arguments.part == "vae" and arguments.text_encoders:
        raise ValueError("--text-encoders belongs to --part transformer")
    if arguments.part == "transformer" and arguments.decoder_only:
        raise ValueError("--decoder-only belongs to --part vae")
    for name, default in (("edges", 0.0), ("latent_noise", 1.0)):
        option, value = f"--{name.replace('_', '-')}", getattr(arguments, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{option} {value} must be a finite number of at least 0")
        if arguments.part == "transformer" and value != default:
            raise ValueError(f"{option} belongs to --part vae")
    train_objective.check(arguments)
    train_subjects.check(arguments)
    _check_record(arguments)
    if arguments.caption is not None and arguments.part == "vae":
        raise ValueError("--caption belongs to --part transformer: an autoencoder reads no captions")
    if arguments.force and not arguments.resume:
        raise ValueError("--force is for --resume: it lets a run go on with other options, weights or images")
    memory_options.check_full(arguments)
    view_options.check(arguments)
    if arguments.part == "vae" and view_options.has_views(arguments):
        raise ValueError("--buckets, --crops and --flips belong to --part transformer")
    if arguments.estimate:
        return
    check_images(arguments)
    output.check_folder(arguments.out)


def check_estimate(arguments: argparse.Namespace, names: Collection[str]) -> None:
    """`check` of the options that --estimate reads: no data or folder is needed, and --params may be one of `names`."""
    check(arguments)
    if arguments.size is not None and arguments.size < 1:
        raise ValueError(f"--size {arguments.size} must be a side in pixels, such as 512")
    if arguments.data not in (None, "shapes"):
        check_data(arguments.data)
    check_estimate_params(arguments.params, names)


def check_estimate_params(params: Sequence[str] | None, names: Collection[str]) -> None:
    """Raises ValueError for a --params that is neither there nor the one name of a released model."""
    if params and len(params) == 1 and params[0] in names:
        return
    try:
        options.check_params(params)
    except ValueError as error:
        raise ValueError(f"{error}; --estimate knows {', '.join(names)} by name") from error


def check_images(arguments: argparse.Namespace) -> None:
    """Raises ValueError for options of images that make no sense, a model and data that are not there."""
    if arguments.size is not None and arguments.size < 1:
        raise ValueError(f"--size {arguments.size} must be a side in pixels, such as 512")
    if arguments.pictures < 1:
        raise ValueError(f"--pictures {arguments.pictures} must be at least 1")
    run_options.check_images(arguments)
    options.check_params(arguments.params)
    if arguments.data != "shapes":
        check_data(arguments.data)
        _check_tars(arguments)


def _check_record(arguments: argparse.Namespace) -> None:
    text = arguments.validation
    if text is not None and not text.isdecimal() and not Path(text).is_dir():
        raise ValueError(f"--validation {text} is neither a number of images to hold out nor a folder that exists")
    if text is not None and text.isdecimal() and not 1 <= int(text) < 2**31:
        raise ValueError(f"--validation {text} must hold out at least 1 image, or be a folder of images")
    if arguments.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "--tensorboard needs the package tensorboard, which is not installed: pip install tensorboard, or "
            "'functional_sd3[tensorboard]'; without it the same numbers are in log.csv"
        )


def check_folder(arguments: argparse.Namespace) -> None:
    """Raises ValueError where --out holds no run to resume, one that is not to be, or what no run left there."""
    checkpoints = _checkpoints(arguments)
    if arguments.resume and not checkpoints:
        raise ValueError(
            f"--resume found no checkpoint in {Path(arguments.out) / 'checkpoints'}; leave --resume out to begin there"
        )
    if arguments.resume:
        done = max(checkpoints)
        if arguments.steps < done:
            raise ValueError(
                f"--steps {arguments.steps} counts all steps, of which {done} are done in {arguments.out}: give more "
                f"to go on, or --steps {done} to write the result again"
            )
        return
    if checkpoints:
        raise ValueError(
            f"--out {arguments.out} holds a run already: --resume goes on with it, from step {max(checkpoints)}; or "
            "name another folder"
        )
    others = sorted(entry.name for entry in Path(arguments.out).iterdir() if not entry.name.startswith("."))
    others = [name for name in others if name not in OURS]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ValueError(
            f"--out {arguments.out} is not empty ({', '.join(others[:3])}{more}), and a trained model would replace "
            "what is there: name a folder that is new or empty"
        )


def check_disk(out: Path, checkpoints: int, result: int, results: int = 1) -> None:
    """Raises ValueError for a disk without room: a run that cannot save is better refused at once.

    checkpoints: bytes of those that are kept and the one that is written beside them. result: bytes of a result, of
    which `results` are written.
    """
    needed = checkpoints + result * results
    saved = (
        file for path in (out / "checkpoints").glob("step-*") for file in (path, *path.glob("*")) if file.is_file()
    )
    free = shutil.disk_usage(out).free + sum(file.stat().st_size for file in saved)
    if free < needed:
        raise ValueError(
            f"{out} has {_size(free)} free; {KEPT_AT_ONCE} checkpoints of {_size(checkpoints // KEPT_AT_ONCE)} and "
            f"{results} result{'s' if results > 1 else ''} of {_size(result)} need {_size(needed)}: make room, or name "
            "a folder on another disk (--out)"
        )


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def _check_tars(arguments: argparse.Namespace) -> None:
    """Raises ValueError for options of a folder of images where --data names tars."""
    from functional_sd3.training import tar_shards

    for name in ("follow", "masks", "control_data"):
        if getattr(arguments, name, None) and tar_shards.is_tars(arguments.data):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is for a folder of images, and --data {arguments.data} names tars")


def check_data(data: str) -> None:
    """Raises ValueError where --data names no folder and no tars."""
    from functional_sd3.training import tar_shards

    path = Path(data)
    if path.is_dir():
        return
    if tar_shards.is_tars(data):
        tar_shards.paths(data)
        return
    wanted = "give a folder of images, or the word shapes"
    if path.exists():
        raise ValueError(f"--data {data} is a file, not a folder; {wanted}")
    raise ValueError(f"--data {data} is not a folder that exists; {wanted}")


def _checkpoints(arguments: argparse.Namespace) -> list[int]:
    from functional_sd3.training import checkpoint

    return [checkpoint.step_of(path) for path in checkpoint.paths(Path(arguments.out) / "checkpoints")]


def newest_checkpoint(out: str) -> str:
    """A sentence that names the newest checkpoint of a run."""
    from functional_sd3.training import checkpoint

    paths = checkpoint.paths(Path(out) / "checkpoints")
    return f"--resume goes on from the newest checkpoint, {paths[-1]}" if paths else "there is no checkpoint yet"
