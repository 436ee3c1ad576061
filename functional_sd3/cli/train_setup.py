"""A training run put together from its command line: model, images, settings, the state it goes on from, its result."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from functional_sd3 import lora, pipeline, weights
from functional_sd3.cli import report, train_model, train_options
from functional_sd3.core import prng, tree
from functional_sd3.formats import files, finite
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.printable import escape
from functional_sd3.image import pixels, vae
from functional_sd3.layouts.components import SPECS, require
from functional_sd3.recipes.shapes.dataset import dataset
from functional_sd3.text import conditioning
from functional_sd3.text.completeness import check_encoders
from functional_sd3.training import checkpoint, continuing, datasets, digests, tasks
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


class Setup(NamedTuple):
    """What a run needs. stored: the model as its files have it; settings: what its checkpoints keep."""

    task: tasks.TrainingTask
    stored: Model
    settings: dict[str, Any]
    options: tasks.Settings


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
    if arguments.resume:
        _check_continuing(arguments, settings)
    key = prng.fold_in(prng.key(arguments.seed), 1)
    if arguments.part == "vae":
        return Setup(tasks.vae_task(key, model, images, options), stored, settings, options)
    latents = _latents(arguments, model, images, settings, say)
    data = {"latents": latents, "ids": ids}
    task = tasks.flow_task(key, model, images, data, options, generate=pipeline.generate)
    return Setup(task, stored, settings, options)


def resume(arguments: argparse.Namespace, setup: Setup, say: Say) -> TrainState:
    """The state of the newest checkpoint that can be read; what changed since, and what is passed over, is said.

    Raises ValueError where the settings differ and may not, WeightsError where there is no checkpoint that can be read.
    """
    folder = Path(arguments.out) / "checkpoints"
    now = setup.settings
    allowed = lambda saved: continuing.check(_differences(saved, now), arguments.out, force=arguments.force)  # noqa: E731
    resumed = checkpoint.load_newest(folder, setup.task.state, allowed)
    for path, error in resumed.passed_over:
        say(f"note: a checkpoint cannot be read: {error}")
        say(f"note: it is set aside as {checkpoint.set_aside(path)}, and the one before is taken: {resumed.path.name}")
    for sentence in continuing.notes(_differences(resumed.settings, now), resumed.settings, now):
        say(f"note: {sentence}")
    state = resumed.state
    say(f"resuming at step {int(state.step)} of {arguments.steps}")
    _say_steps(resumed.settings, setup.options, state, say)
    return state


def newest(folder: Path) -> str:
    """A sentence that names the newest checkpoint."""
    found = checkpoint.paths(folder)
    return f"--resume goes on from the newest checkpoint, {found[-1]}" if found else "there is no checkpoint yet"


def has_checkpoint(folder: Path) -> bool:
    return bool(checkpoint.paths(folder))


def save_image(path: Path, images: torch.Tensor) -> None:
    """Write images (batch, 3, height, width) in [0, 1] as one PNG, four a row."""
    import io

    buffer = io.BytesIO()
    pixels.to_pil(pixels.grid(images.cpu(), columns=4))[0].save(buffer, format="PNG")
    files.write_atomic(path, buffer.getvalue())


def save_result(out: Path, state: TrainState, setup: Setup, lora_name: str) -> Path:
    """Write the LoRA, or the whole model: what was trained in the dtypes it was stored in, the rest as it was stored.

    Returns what was written.
    """
    if setup.options.lora:
        lora.save(out / lora_name, state.ema)
        return out / lora_name
    trained, stored = setup.task.model(state), setup.stored
    params = {name: train_model.as_stored(trained.params[name], stored.params[name]) for name in setup.task.trained}
    weights.save(out, stored._replace(config=trained.config, params={**stored.params, **params}))
    return out


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
    contents |= {f"the {name} of the model": digests.params_digest(stored.params[name]) for name in used}
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


def _check_continuing(arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Before images are encoded: the settings of the newest checkpoint, where they can be read."""
    for path in reversed(checkpoint.paths(Path(arguments.out) / "checkpoints")):
        try:
            saved = checkpoint.settings(path)
        except WeightsError:
            continue
        continuing.check(_differences(saved, settings), arguments.out, force=arguments.force)
        return


def _say_steps(saved: dict[str, Any], options: tasks.Settings, state: TrainState, say: Say) -> None:
    """What another number of steps means for the learning rate."""
    before, done = saved.get("steps"), int(state.step)
    if not isinstance(before, int) or before == options.steps or done >= options.steps:
        return
    sentence = f"note: {before} steps were planned, now {options.steps}"
    if options.schedule == "cosine":
        rate = float(tasks.learning_rate(options)(state.step))
        sentence += f": the cosine of the learning rate ends there now, and the rate goes on at {rate:.3g}"
    say(sentence)


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
