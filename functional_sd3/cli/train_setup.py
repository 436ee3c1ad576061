"""A run of `train` put together from its command line: model, images and settings."""

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from functional_sd3 import pipeline
from functional_sd3.cli import (
    distilled,
    memory_options,
    train_cache,
    train_data,
    train_extras,
    train_model,
    train_objective,
    train_options,
    train_results,
    train_subjects,
    training_run,
)
from functional_sd3.cli.training_run import Setup
from functional_sd3.core import prng
from functional_sd3.layouts.components import SPECS
from functional_sd3.parallel.mesh import ONE_PROCESS, Mesh, describe
from functional_sd3.text import conditioning, textual_inversion
from functional_sd3.text.completeness import check_encoders
from functional_sd3.training import continuing, digests, division, flow_learners, flow_task, tasks, vae_task
from functional_sd3.training.step import TrainState
from functional_sd3.training.training_images import TrainingImages
from functional_sd3.weights import shipped
from functional_sd3.weights.model import Model

Say = Callable[[str], None]
_FREE = (
    "out",
    "params",
    "variant",
    "resume",
    "force",
    "estimate",
    "caption",
    "follow",
    "device",
    "save_every",
    "log_every",
    "mesh",
    "sample_every",
    "result_every",
    "validate_every",
    "tensorboard",
)
"""The options that a checkpoint does not keep: they may change, or their contents are kept as digests."""


def prepare(arguments: argparse.Namespace, say: Say, mesh: Mesh = ONE_PROCESS, is_first: bool = True) -> Setup:
    """Model and images read, compared with those of the run that is resumed, and encoded.

    mesh: the processes of the run; is_first: False in those that read what the first one encoded.

    Raises ValueError where they, or the options, may not be used together or with that run.
    """
    source = [shipped.resolve(path) for path in arguments.params or [shipped.NAME]]
    cached = train_cache.open_images(arguments, source)
    only = cached and train_cache.components(arguments, cached)
    stored, model, dtype = train_model.load(arguments, source, only, mesh)
    model = memory_options.with_computations(
        arguments, model, train_model.trained(arguments, model), mesh, train_model.divided(arguments, model)
    )
    if arguments.part != "vae":
        distilled.check_training(stored.config)
    if arguments.part != "vae" and cached is None:
        # Before images are drawn and encoded, which takes minutes.
        check_encoders([name for name in tasks.ENCODERS if name in model.params], model.tokenizers)
    if arguments.fused_update:
        say("note: with --fused-update gradients are not clipped, as no step has all of them at once")
    options = _options(arguments, model, dtype)
    reader = model if options.inversion is None else flow_learners.with_tokens(model, options.inversion)
    images = cached or train_data.images(arguments, model, say)
    ids = None if arguments.part == "vae" or cached else train_data.tokens(reader, images.captions)
    if options.inversion is not None and ids is not None:
        _check_word(options.inversion, model, ids, say)
    settings = _settings(arguments, source, stored, images, ids)
    settings |= {"dtype": str(dtype or torch.float32).removeprefix("torch."), "mesh": describe(mesh.sizes)}
    differences = lambda saved: _differences(saved, settings)  # noqa: E731
    if arguments.resume:
        # Before images of the class are drawn, which would be others than those of the run.
        training_run.check_continuing(arguments, differences)
    extras = train_extras.NONE
    if not isinstance(images, train_cache.CachedImages):
        # Images of the class are drawn by the first process alone.
        drawing = lambda: model if not division.is_joint(mesh) else train_model.load(arguments, source)[1]  # noqa: E731
        extras = train_extras.gather(arguments, model, images, say, drawing)
    settings |= _digests(extras.contents)
    if arguments.resume:
        training_run.check_continuing(arguments, differences)
    key = prng.fold_in(prng.key(arguments.seed), 1)

    def setup(task: tasks.TrainingTask) -> Setup:
        step_note = lambda saved, state: _step_note(saved, options, state)  # noqa: E731
        save = train_results.saver(options, stored)
        return Setup(task, stored, settings, differences, bool(options.lora), step_note, save=save)

    if isinstance(images, train_cache.CachedImages):
        model = train_cache.without_encoder(model)
        data = train_cache.training_data(images, model, options.text_encoders)
        data, captions, held_out = train_extras.hold_out(arguments, data, images.captions)
        generate = pipeline.generate if options.text_encoders else train_cache.generate(images)
        task = flow_task.flow_task(key, model, captions, data, options, generate=generate, held_out=held_out, mesh=mesh)
        return setup(task)._replace(rest=lambda: train_model.rest(arguments, source, stored))
    if arguments.part == "vae":
        return setup(vae_task.vae_task(key, model, images, options, mesh=mesh))
    with_ids = options.text_encoders or options.inversion is not None
    # Embeddings of the first process are read as those of a resumed run are.
    reading = arguments if is_first else argparse.Namespace(**{**vars(arguments), "resume": True})
    data, captions, prior, held_out = train_extras.training_sets(
        reading, reader, images, extras, options.control, settings, say, with_ids=with_ids
    )
    task = flow_task.flow_task(
        key, model, captions, data, options, generate=pipeline.generate, prior=prior, held_out=held_out, mesh=mesh
    )
    return setup(task)


def _check_word(inversion: flow_learners.Inversion, model: Model, ids: conditioning.Ids, say: Say) -> None:
    """Raises ValueError where no caption holds the word; notes the number of images whose caption does not."""
    name, first = next(iter(textual_inversion.first_ids(model.tokenizers, inversion.encoders).items()))
    has_word = (getattr(ids, name) == first).any(-1)
    if not has_word.any():
        raise ValueError(
            f"no caption of --data holds {inversion.token}, so nothing would be learned: write it into the captions, "
            f"or give --caption 'a photo of {inversion.token}'"
        )
    if not has_word.all():
        say(f"note: {int((~has_word).sum())} of {len(has_word)} captions do not hold {inversion.token}")


def _options(arguments: argparse.Namespace, model: Model, dtype: torch.dtype | None) -> tasks.Settings:
    control = None
    if arguments.control is not None:
        control = flow_learners.control_config(model.config, arguments.control, arguments.control_depth)
    return tasks.Settings(
        steps=arguments.steps,
        batch=arguments.batch_size,
        rate=arguments.lr,
        warmup=arguments.warmup,
        schedule=arguments.schedule,
        ema=arguments.ema,
        accumulate=arguments.accumulate,
        dropout=arguments.dropout,
        density=train_objective.density(arguments.density),
        shift=arguments.shift,
        weight=train_objective.weight(arguments.loss_weight),
        prior_weight=1.0 if arguments.prior_weight is None else arguments.prior_weight,
        control=control,
        inversion=train_subjects.inversion(arguments),
        word_rate=arguments.word_lr,
        scratch=arguments.scratch,
        lora=arguments.lora or 0,
        text_encoders=train_model.text_encoders(vars(arguments)) == "train",
        decoder_only=arguments.decoder_only,
        edges=arguments.edges,
        latent_noise=arguments.latent_noise,
        dtype=dtype,
        compile=arguments.compile,
        rule=memory_options.update_rule(arguments),
    )


def _settings(
    arguments: argparse.Namespace,
    source: list[Path],
    stored: Model,
    images: TrainingImages | train_cache.CachedImages,
    ids: conditioning.Ids | None,
) -> dict[str, Any]:
    """The settings in a checkpoint: the options of a run, and digests of its model and data."""
    options = {name.replace("_", "-"): getattr(arguments, name) for name in _defaults()}
    used = [name for name in SPECS if name in stored.params and (name == "vae" or arguments.part == "transformer")]
    contents = {"the data": images.contents}
    contents |= digests.model_digests({name: stored.params[name] for name in used})
    if ids is not None:
        contents["the tokens"] = digests.params_digest(ids._asdict())
    return {
        **options,
        **train_extras.option_settings(arguments),
        "text-encoders": train_model.text_encoders(vars(arguments)),
        "params": os.pathsep.join(str(path.resolve()) for path in source),
        "fingerprint of the data": images.fingerprint,
        **_digests(contents),
    }


def _digests(contents: Mapping[str, str]) -> dict[str, str]:
    return {continuing.CONTENTS + name: digest for name, digest in contents.items()}


def _defaults() -> dict[str, Any]:
    """Every option that a checkpoint keeps with its default: all that the command has but the free ones."""
    parser = argparse.ArgumentParser()
    train_options.add_arguments(parser)
    values = vars(parser.parse_args(["--data", "shapes", "--out", "."]))
    return {name: values[name] for name in sorted(values) if name not in _FREE} | {"data": None}


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> list[continuing.Difference]:
    defaults = {name.replace("_", "-"): default for name, default in _defaults().items()} | {"dtype": "float32"}
    before = {**defaults, **saved}
    return continuing.differences({**saved, "text-encoders": train_model.text_encoders(before)}, now, defaults)


def _step_note(saved: dict[str, Any], options: tasks.Settings, state: TrainState) -> str | None:
    """A note on the learning rate of a run that is resumed with another number of steps."""
    sentence = training_run.steps_note(options.steps, saved, state)
    if sentence is not None and options.schedule == "cosine":
        rate = float(tasks.learning_rate(options)(state.step))
        sentence += f": the cosine of the learning rate ends there now, and the rate goes on at {rate:.3g}"
    return sentence
