"""Images that `train` and `distill` learn from: read, tokenized, encoded once for a run."""

import argparse
import functools
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from functional_sd3 import pipeline
from functional_sd3.cli import report, view_options
from functional_sd3.core import prng, tree
from functional_sd3.formats import files, finite
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.printable import escape
from functional_sd3.image import vae
from functional_sd3.image.cuts import Cut
from functional_sd3.layouts.components import Config, require
from functional_sd3.recipes.shapes.dataset import dataset
from functional_sd3.text import conditioning
from functional_sd3.training import (
    buckets,
    cache,
    cache_writing,
    continuing,
    datasets,
    digests,
    tar_shards,
    tasks,
    text_table,
    training_images,
    training_set,
    views,
)
from functional_sd3.training.training_images import TrainingImages
from functional_sd3.weights.model import Model

ENCODED = "data.safetensors"
"""The file beside the checkpoints that keeps the latents of all images."""
VIEWS = "latents"
"""The folder beside them that keeps latents of several sizes or views."""
TEXT_BYTES = 2**29
"""Memory that the conditioning of all captions may take: 98 captions of SD3 in float32, any number of the same one."""
Say = Callable[[str], None]


def images(arguments: argparse.Namespace, model: Model, say: Say) -> TrainingImages:
    """The images of --data, with notes on those that are skipped and on other facts worth knowing."""
    if arguments.data == "shapes":
        return dataset(prng.key(arguments.seed), arguments.pictures, side(arguments, model))
    tars = None
    if tar_shards.is_tars(arguments.data):
        tars = tar_shards.tar_set(arguments.data, template=arguments.template, caption=arguments.caption)
    index = (
        tars.listing
        if tars
        else datasets.image_folder(
            arguments.data, template=arguments.template, caption=arguments.caption, follow=arguments.follow
        )
    )
    say(datasets.summary(index, captioned=arguments.part == "transformer"))
    for note in index.notes:
        say(f"note: {note}")
    for path, reason in index.skipped[:10]:
        say(f"skipped {escape(path)}: {escape(reason)}")
    if len(index.skipped) > 10:
        say(f"skipped {len(index.skipped) - 10} more, {len(index.skipped)} in all")
    pixels = side(arguments, model)
    read = training_images.tar_images(tars, pixels) if tars else training_images.folder_images(index, pixels)
    if getattr(arguments, "buckets", None) is None:
        square = views.Views(buckets.Buckets(((pixels, pixels),), (0,) * len(read.sizes)))
        for line in view_options.enlarged_note(square, read.sizes, read.names):
            say(line)
    return read


def side(arguments: argparse.Namespace, model: Model) -> int:
    """Side of the images in pixels. Raises ValueError for one that the model has no latents for."""
    if arguments.part == "vae":
        return arguments.size or require(model.config, "vae").sample_size
    return latent_side(arguments, model.config) * vae.factor(require(model.config, "vae"))


def latent_side(arguments: argparse.Namespace, config: Config) -> int:
    """Side of the latents of the images. Raises ValueError for a --size that the model has none for."""
    try:
        return pipeline.latent_size(config, arguments.size, arguments.size, tiled=False)[0]
    except ValueError as error:
        raise ValueError(f"--size {arguments.size}: {error}") from None


def tokens(model: Model, captions: Sequence[str]) -> conditioning.Ids:
    """Tokens of the captions, (captions, length) each."""
    return conditioning.tokenize(model.config, model.tokenizers, captions, t5_length=t5_length(model))


def t5_length(model: Model) -> int:
    """Tokens that T5 reads: those of its tokenizer, at most 256."""
    t5 = model.tokenizers.t5
    return 256 if t5 is None else min(256, t5.model_max_length)


def training_data(
    arguments: argparse.Namespace,
    model: Model,
    images: TrainingImages,
    ids: conditioning.Ids | None,
    settings: dict[str, Any],
    say: Say,
    *,
    with_ids: bool = False,
    file: str = ENCODED,
    contents: str = "the data",
) -> training_set.TrainingSet:
    """Latents and text of the images. Captions of encoders that do not learn are encoded once, where all of them take
    at most `TEXT_BYTES`; else, and `with_ids`, at every step, from `ids`. file, contents: as in `latents`."""
    if view_options.has_views(arguments):
        encoded = _viewed_latents(arguments, model, images, settings, say)
    else:
        resident = latents(arguments, model, images, settings, say, file=file, contents=contents)
        encoded = training_set.resident(resident)
    is_frozen = settings["text-encoders"] == "frozen" and not with_ids
    if is_frozen and (text := _resident_text(model, images)) is not None:
        return training_set.TrainingSet(encoded, text)
    empty = tokens(model, [""])
    ids = tokens(model, images.captions) if ids is None else ids
    return training_set.TrainingSet(encoded, training_set.token_text(ids, empty))


def _resident_text(model: Model, images: TrainingImages) -> training_set.Text | None:
    """The conditioning of all captions, or None where it would take too much memory."""
    captions, length = text_table.distinct(images.captions), t5_length(model)
    ids = tokens(model, captions.texts)
    encoders = {name: params for name, params in model.params.items() if name in tasks.ENCODERS}
    if len(captions.texts) * text_table.row_bytes(encoders, model.config, ids) > TEXT_BYTES:
        return None
    table = text_table.encode(encoders, model.config, ids, track=_bar("encoding captions"))
    return text_table.resident(table, captions.rows, length)


def image_views(arguments: argparse.Namespace, model: Model, images: TrainingImages) -> views.Views:
    """The cuts of the images that are learned from."""
    return view_options.views(arguments, model.config, images.sizes, images.side, arguments.batch_size)


def _viewed_latents(
    arguments: argparse.Namespace, model: Model, images: TrainingImages, settings: dict[str, Any], say: Say
) -> training_set.Latents:
    """Latents in several sizes or views."""
    cuts = image_views(arguments, model, images)
    for line in view_options.describe(cuts, model.config):
        say(line)
    if arguments.buckets is not None:
        for line in view_options.enlarged_note(cuts, images.sizes, images.names):
            say(line)
    view_options.check_room(cuts, model.config, Path(arguments.out) / "checkpoints" / VIEWS)
    params = tree.cast(model.params["vae"], torch.float32)
    encode = functools.partial(datasets.encode_images, params, require(model.config, "vae"))
    return stored_views(arguments, VIEWS, images.contents, model, images, settings, encode, say)


def stored_views(
    arguments: argparse.Namespace,
    name: str,
    contents: str,
    model: Model,
    images: TrainingImages,
    settings: dict[str, Any],
    encode: Callable[[torch.Tensor], torch.Tensor],
    say: Say,
    image_cut: Callable[[int, Cut], torch.Tensor] | None = None,
) -> training_set.Latents:
    """Latents in several sizes or views, in a cache beside the checkpoints that is made once for a run.

    name: of its folder. contents: digest of what is encoded. encode, image_cut: as in `cache_writing.write_latents`.
    """
    cuts = image_views(arguments, model, images)
    folder = Path(arguments.out) / "checkpoints" / name
    factor = vae.factor(require(model.config, "vae"))
    manifest = cache.Manifest(
        {"vae": settings[f"{continuing.CONTENTS}the vae of the model"]},
        contents,
        images.fingerprint,
        {"changes": view_options.changes(arguments)},
        tuple((height // factor, width // factor) for width, height in cuts.buckets.sizes),
        len(images.captions),
        0,
        cuts.count,
        t5_length(model),
    )
    try:
        cache.begin(folder, manifest)
    except WeightsError as error:
        say(f"note: the images are encoded again: {error}")
        shutil.rmtree(folder)
        cache.begin(folder, manifest)
    captions = torch.zeros(len(images.captions), dtype=torch.int64, device="cpu")
    cache_writing.write_latents(folder, manifest, images, cuts, captions, encode, _bar("encoding"), image_cut)
    return cache.latents(cache.open_cache(folder))


def latents(
    arguments: argparse.Namespace,
    model: Model,
    images: TrainingImages,
    settings: dict[str, Any],
    say: Say,
    *,
    file: str = ENCODED,
    contents: str = "the data",
) -> torch.Tensor:
    """The latents of all images: computed once for a run, and read again while images and autoencoder are the same.

    file: where they are kept, beside the checkpoints. contents: the name of the images' digest in `settings`.
    """
    names = [continuing.CONTENTS + name for name in (contents, "the vae of the model")]

    def encode() -> torch.Tensor:
        # Latents are what all else is learned from: float32, whatever the autoencoder is stored in.
        params = {**model.params, "vae": tree.cast(model.params["vae"], torch.float32)}
        return datasets.encode_all(
            params, model.config, model.tokenizers, images.captions, images.load,
            batch=views.images_at_once(images.side, images.side), t5_length=t5_length(model), track=_bar("encoding"),
        )["latents"]  # fmt: skip

    of = digests.combined(settings[name] for name in names)
    return stored_latents(arguments, file, of, len(images.captions), encode, say)


def stored_latents(
    arguments: argparse.Namespace, file: str, of: str, count: int, encode: Callable[[], torch.Tensor], say: Say
) -> torch.Tensor:
    """`encode()`, kept in a file beside the checkpoints, or what it holds already of the contents with the digest `of`:
    float32 latents of `count` images."""
    path = Path(arguments.out) / "checkpoints" / file
    # Also of a run that ended before its first checkpoint.
    if path.exists():
        try:
            return _read_latents(path, of, count)
        except WeightsError as error:
            say(f"note: the images are encoded again: {error}")
    latents = encode()
    files.write_atomic(path, {"latents": latents}, metadata={"contents": of})
    return latents


def track(count: int, words: str, batch: int = 16) -> Iterable[range]:
    """Ranges of `batch` rows, with a progress bar on a terminal."""
    return _bar(words)([range(start, min(start + batch, count)) for start in range(0, count, batch)])


def _bar(words: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    from tqdm import tqdm

    return lambda rows: tqdm(rows, desc=words, leave=False, disable=not report.has_bars())


def _read_latents(path: Path, of: str, count: int) -> torch.Tensor:
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
