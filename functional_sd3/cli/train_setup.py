"""A run of `train` put together from its command line: model, images and settings."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from functional_sd3 import pipeline
from functional_sd3.cli import report, train_model, train_options, training_run
from functional_sd3.cli.training_run import Setup
from functional_sd3.core import prng, tree
from functional_sd3.formats import files, finite
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.printable import escape
from functional_sd3.image import vae
from functional_sd3.layouts.components import SPECS, require
from functional_sd3.recipes.shapes.dataset import dataset
from functional_sd3.text import conditioning
from functional_sd3.text.completeness import check_encoders
from functional_sd3.training import continuing, datasets, digests, tasks
from functional_sd3.training.step import TrainState
from functional_sd3.weights import shipped
from functional_sd3.weights.model import Model

ENCODED = "data.safetensors"
"""The file beside the checkpoints that keeps the latents of all images."""
Say = Callable[[str], None]
_RECORDED = (
    "accumulate", "batch_size", "compile", "data", "decoder_only", "dropout", "dtype", "edges", "ema", "latent_noise",
    "lora", "lr", "part", "pictures", "schedule", "scratch", "seed", "size", "steps", "template", "text_encoders",
    "warmup",
)  # fmt: skip
"""The options that a checkpoint keeps."""


def prepare(arguments: argparse.Namespace, say: Say) -> Setup:
    """Model and images read, compared with those of the run that is resumed, and encoded.

    Raises ValueError where they, or the options, may not be used together or with that run.
    """
    source = [shipped.resolve(path) for path in arguments.params or [shipped.NAME]]
    stored, model, dtype = train_model.load(arguments, source)
    if arguments.part != "vae":
        # Before images are drawn and encoded, which takes minutes.
        check_encoders([name for name in tasks.ENCODERS if name in model.params], model.tokenizers)
    images = _images(arguments, model, say)
    options = _options(arguments, dtype)
    ids = None if arguments.part == "vae" else _tokens(model, images)
    settings = _settings(arguments, source, stored, images, ids)
    settings["dtype"] = str(dtype or torch.float32).removeprefix("torch.")
    differences = lambda saved: _differences(saved, settings)  # noqa: E731
    if arguments.resume:
        training_run.check_continuing(arguments, differences)
    key = prng.fold_in(prng.key(arguments.seed), 1)

    def setup(task: tasks.TrainingTask) -> Setup:
        step_note = lambda saved, state: _step_note(saved, options, state)  # noqa: E731
        return Setup(task, stored, settings, differences, bool(options.lora), step_note)

    if arguments.part == "vae":
        return setup(tasks.vae_task(key, model, images, options))
    latents = _latents(arguments, model, images, settings, say)
    data = {"latents": latents, "ids": ids}
    return setup(tasks.flow_task(key, model, images, data, options, generate=pipeline.generate))


def _images(arguments: argparse.Namespace, model: Model, say: Say) -> tasks.TrainingImages:
    if arguments.part == "vae":
        side = arguments.size or require(model.config, "vae").sample_size
    else:
        factor = vae.factor(require(model.config, "vae"))
        side = pipeline.latent_size(model.config, arguments.size, arguments.size)[0] * factor
    if arguments.data == "shapes":
        return dataset(prng.key(arguments.seed), arguments.pictures, side)
    index = datasets.image_folder(
        arguments.data, template=arguments.template, caption=arguments.caption, follow=arguments.follow
    )
    say(datasets.summary(index, captioned=arguments.part == "transformer"))
    for note in index.notes:
        say(f"note: {note}")
    for path, reason in index.skipped[:10]:
        say(f"skipped {escape(path)}: {escape(reason)}")
    if len(index.skipped) > 10:
        say(f"skipped {len(index.skipped) - 10} more, {len(index.skipped)} in all")
    return tasks.folder_images(index, side)


def _options(arguments: argparse.Namespace, dtype: torch.dtype | None) -> tasks.Settings:
    return tasks.Settings(
        steps=arguments.steps,
        batch=arguments.batch_size,
        rate=arguments.lr,
        warmup=arguments.warmup,
        schedule=arguments.schedule,
        ema=arguments.ema,
        accumulate=arguments.accumulate,
        dropout=arguments.dropout,
        scratch=arguments.scratch,
        lora=arguments.lora or 0,
        text_encoders=train_model.text_encoders(vars(arguments)) == "train",
        decoder_only=arguments.decoder_only,
        edges=arguments.edges,
        latent_noise=arguments.latent_noise,
        dtype=dtype,
        compile=arguments.compile,
    )


def _settings(
    arguments: argparse.Namespace,
    source: list[Path],
    stored: Model,
    images: tasks.TrainingImages,
    ids: conditioning.Ids | None,
) -> dict[str, Any]:
    """What a checkpoint keeps of a run: its options, and digests of what it reads."""
    options = {name.replace("_", "-"): getattr(arguments, name) for name in _RECORDED}
    used = [name for name in SPECS if name in stored.params and (name == "vae" or arguments.part == "transformer")]
    contents = {"the data": images.contents}
    contents |= digests.model_digests({name: stored.params[name] for name in used})
    if ids is not None:
        contents["the tokens"] = digests.params_digest(ids._asdict())
    return {
        **options,
        "text-encoders": train_model.text_encoders(vars(arguments)),
        "params": os.pathsep.join(str(path.resolve()) for path in source),
        "fingerprint of the data": images.fingerprint,
        **{continuing.CONTENTS + name: digest for name, digest in contents.items()},
    }


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> list[continuing.Difference]:
    parser = argparse.ArgumentParser()
    train_options.add_arguments(parser)
    defaults = {name.replace("_", "-"): parser.get_default(name) for name in _RECORDED}
    defaults["dtype"] = "float32"
    before = {**defaults, **saved}
    return continuing.differences({**saved, "text-encoders": train_model.text_encoders(before)}, now, defaults)


def _step_note(saved: dict[str, Any], options: tasks.Settings, state: TrainState) -> str | None:
    """What another number of steps means for the learning rate."""
    before, done = saved.get("steps"), int(state.step)
    if not isinstance(before, int) or before == options.steps or done >= options.steps:
        return None
    sentence = f"note: {before} steps were planned, now {options.steps}"
    if options.schedule == "cosine":
        rate = float(tasks.learning_rate(options)(state.step))
        sentence += f": the cosine of the learning rate ends there now, and the rate goes on at {rate:.3g}"
    return sentence


def _tokens(model: Model, images: tasks.TrainingImages) -> conditioning.Ids:
    return conditioning.tokenize(model.config, model.tokenizers, images.captions, t5_length=_t5_length(model))


def _t5_length(model: Model) -> int:
    t5 = model.tokenizers.t5
    return 256 if t5 is None else min(256, t5.model_max_length)


def _latents(
    arguments: argparse.Namespace, model: Model, images: tasks.TrainingImages, settings: dict[str, Any], say: Say
) -> torch.Tensor:
    """The latents of all images: computed once for a run, and read again while images and autoencoder are the same."""
    from tqdm import tqdm

    path = Path(arguments.out) / "checkpoints" / ENCODED
    names = [continuing.CONTENTS + name for name in ("the data", "the vae of the model")]
    of = digests.combined(settings[name] for name in names)
    if arguments.resume and path.exists():
        try:
            return _kept_latents(path, of, len(images.captions))
        except WeightsError as error:
            say(f"note: the images are encoded again: {error}")
    track = lambda rows: tqdm(rows, desc="encoding", leave=False, disable=not report.has_bars())  # noqa: E731
    # Latents are what all else is learned from: float32, whatever the autoencoder is stored in.
    params = {**model.params, "vae": tree.cast(model.params["vae"], torch.float32)}
    latents = datasets.encode_all(
        params, model.config, model.tokenizers, images.captions, images.load,
        t5_length=_t5_length(model), track=track,
    )["latents"]  # fmt: skip
    files.write_atomic(path, {"latents": latents}, metadata={"contents": of})
    return latents


def _kept_latents(path: Path, of: str, count: int) -> torch.Tensor:
    mapped = files.open_mapped(path)
    if mapped.header.metadata.get("contents") != of:
        raise WeightsError(f"{path}: holds the latents of other images or of another autoencoder")
    entry = mapped.header.tensors.get("latents")
    if entry is None or entry.shape[:1] != (count,) or entry.dtype != torch.float32:
        raise WeightsError(f"{path}: holds no latents of {count} images")
    latents = files.tensor(mapped, "latents")
    if what := finite.nonfinite_kind(latents):
        raise WeightsError(f"{path}: holds {what}")
    return latents
