"""A run of `distill` put together from its command line: teacher, images and settings."""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from functional_sd3 import pipeline
from functional_sd3.cli import distill_options, distill_pairs, memory_options, train_checks, train_data, train_model
from functional_sd3.cli.training_run import Setup, check_continuing, steps_note
from functional_sd3.core import prng
from functional_sd3.flow import schedule
from functional_sd3.parallel.mesh import ONE_PROCESS, Mesh, describe
from functional_sd3.text.completeness import check_encoders
from functional_sd3.training import cache, continuing, digests, distill_methods, distill_task, division, tasks
from functional_sd3.training.distill_options import OPTIONS
from functional_sd3.training.training_images import TrainingImages
from functional_sd3.weights import metadata, shipped
from functional_sd3.weights.model import Model

Say = Callable[[str], None]
_RECORDED = (
    "accumulate", "batch_size", "cfg", "data", "dtype", "ema", "lora", "lr", "method", "pictures", "seed", "shift",
    "size", "steps", "teacher_dtype", "template", "to", "warmup", *OPTIONS,
    *memory_options.NAMES,
)  # fmt: skip
"""The options that a checkpoint keeps."""


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for an option, or options together, that make no sense, and for data that is not there."""
    distill_options.check(arguments)
    if arguments.data != "shapes":
        train_checks.check_data(arguments.data)
        if cache.is_cache(arguments.data):
            raise ValueError(f"--data {arguments.data} is a cache, which train reads; distill takes its images")


def prepare(arguments: argparse.Namespace, say: Say, mesh: Mesh = ONE_PROCESS, is_first: bool = True) -> Setup:
    """Teacher and images read, compared with those of the run that is resumed, and encoded.

    mesh: the processes of the run; is_first: False in those that read what the first one encoded.

    Raises ValueError where they, or the options, may not be used together or with that run.
    """
    source = [shipped.resolve(path) for path in arguments.params or [shipped.NAME]]
    arguments = argparse.Namespace(**{**vars(arguments), "part": "transformer"})
    stored, model, dtype = train_model.load(arguments, source, mesh=mesh)
    divided = train_model.divided(arguments, model)
    model = memory_options.with_computations(arguments, model, ("transformer",), mesh, divided)
    options = _options(arguments, stored, dtype)
    check_encoders([name for name in tasks.ENCODERS if name in model.params], model.tokenizers)
    images = train_data.images(arguments, model, say)
    ids = train_data.tokens(model, images.captions)
    settings = _settings(arguments, source, stored, images, options) | {"mesh": describe(mesh.sizes)}
    differences = lambda saved: _differences(saved, settings)  # noqa: E731
    if arguments.resume:
        check_continuing(arguments, differences)
    # Embeddings and samples of the first process are read as those of a resumed run are.
    reading = arguments if is_first else argparse.Namespace(**{**vars(arguments), "resume": True})
    if distill_methods.METHODS[options.method].has_pairs:
        # The first process draws them alone.
        drawing = model if not division.is_joint(mesh) else train_model.load(arguments, source)[1]
        data = {**distill_pairs.pairs(reading, drawing, ids, options, settings, say), "ids": ids}
        del drawing
    else:
        data = {"latents": train_data.latents(reading, model, images, settings, say), "ids": ids}
    task = distill_task.distill_task(
        prng.fold_in(prng.key(arguments.seed), 3), model, images.captions, data, options, generate=pipeline.generate,
        mesh=mesh,
    )  # fmt: skip
    student_config = distill_task.student_config(stored.config, options)
    changed = ("transformer",) if student_config.transformer != stored.config.transformer else ()
    student = metadata.write(student_config, changed)
    return Setup(task, stored, settings, differences, bool(options.lora), partial(steps_note, arguments.steps), student)


def _options(arguments: argparse.Namespace, stored: Model, dtype: torch.dtype | None) -> distill_task.Settings:
    """The settings. Raises ValueError where the model of --params cannot be distilled so, naming the option."""
    levels = stored.config.schedule or schedule.Config()
    if levels.distillation == "segments" and (arguments.inner is not None or arguments.shift is not None):
        raise ValueError(
            "--inner and --shift are for a teacher that draws in any steps: a student of segments has its grid, and is "
            "followed step by step"
        )
    default_cfg = 1.0 if levels.guidance_distilled else 5.0
    teacher_dtype = None if arguments.teacher_dtype is None else getattr(torch, arguments.teacher_dtype)
    settings = distill_task.Settings(
        to=arguments.to,
        method=arguments.method,
        batch=arguments.batch_size,
        cfg=default_cfg if arguments.cfg is None else arguments.cfg,
        shift=3.0 if arguments.shift is None else arguments.shift,
        rate=arguments.lr,
        warmup=arguments.warmup,
        ema=arguments.ema,
        accumulate=arguments.accumulate,
        lora=arguments.lora or 0,
        dtype=dtype,
        teacher_dtype=teacher_dtype or dtype,
        rule=memory_options.update_rule(arguments),
        **{name: getattr(arguments, name) for name in OPTIONS},
    )
    try:
        return distill_task.student_settings(stored.config, settings)
    except ValueError as error:
        raise ValueError(f"--{error}" if str(error).startswith(("to ", "cfg ")) else str(error)) from error


def _settings(
    arguments: argparse.Namespace,
    source: list[Path],
    stored: Model,
    images: TrainingImages,
    options: distill_task.Settings,
) -> dict[str, Any]:
    """The settings in a checkpoint: the options of a run, and digests of its model and data."""
    given = {name.replace("_", "-"): getattr(arguments, name) for name in _RECORDED}
    resolved = ("cfg", "shift", *OPTIONS)
    given |= {name.replace("_", "-"): getattr(options, name) for name in resolved}
    # Of methods that have no such option too: it decides which numbers a checkpoint holds.
    given["log-variance"] = bool(options.log_variance)
    contents = {"the data": images.contents, **digests.model_digests(stored.params)}
    return {
        **given,
        "params": os.pathsep.join(str(path.resolve()) for path in source),
        "fingerprint of the data": images.fingerprint,
        **{continuing.CONTENTS + name: digest for name, digest in contents.items()},
    }


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> list[continuing.Difference]:
    parser = argparse.ArgumentParser()
    distill_options.add_arguments(parser)
    defaults = {name.replace("_", "-"): parser.get_default(name) for name in _RECORDED} | {"log-variance": False}
    return [_of_method(each) for each in continuing.differences(saved, now, defaults)]


def _of_method(difference: continuing.Difference) -> continuing.Difference:
    """The difference, which is fixed where it is of two methods whose states have other tensors."""
    before, now = (distill_methods.METHODS.get(str(value)) for value in difference[1:3])
    if difference.name != "method" or (before and now and distill_methods.has_state_of(before, now)):
        return difference
    return difference._replace(is_fixed=True)
