"""A run of `cache`: images and captions read, the manifest written or compared, and what is missing encoded."""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch

from functional_sd3 import weights
from functional_sd3.cli import output, report, runtime, train_checks, train_data, train_model, view_options
from functional_sd3.cli.train_cache import ENCODED
from functional_sd3.cli.training_run import say
from functional_sd3.core import tree
from functional_sd3.image import vae
from functional_sd3.layouts.components import require
from functional_sd3.text.completeness import check_encoders
from functional_sd3.training import cache, cache_writing, datasets, interruption, lock, tasks, text_table
from functional_sd3.training.training_images import TrainingImages
from functional_sd3.training.views import Views
from functional_sd3.weights import shipped, sketch
from functional_sd3.weights.model import Model

BUCKET_LEAST = 16
"""Images of a bucket at least, by default: a batch of `train`."""


def run(arguments: argparse.Namespace) -> int:
    """Write the cache; the exit status."""
    _check(arguments)
    with interruption.terminated_like_interrupted(), lock.hold(arguments.out, say):
        try:
            report.say(_write(arguments))
        except KeyboardInterrupt:
            say(f"stopped; the shards in {arguments.out} are kept, and the same command goes on after them")
            return 130
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for options that make no sense, and data that is not there, before anything is read."""
    cache_writing.check_rows(arguments.shard)
    view_options.check(arguments)
    train_checks.check_images(arguments)
    if cache.is_cache(arguments.data):
        raise ValueError(f"--data {arguments.data} is a cache already; name a folder of images")
    output.check_folder(arguments.out)
    out = Path(arguments.out)
    others = [] if not out.exists() or cache.is_cache(out) else [each.name for each in out.iterdir()]
    if others := [name for name in others if not name.startswith(".")]:
        raise ValueError(f"--out {out} holds {others[0]} and no cache: name a folder that is new or empty")


def _write(arguments: argparse.Namespace) -> str:
    source = [shipped.resolve(path) for path in arguments.params or [shipped.NAME]]
    outline = weights.outline(source, variant=arguments.variant)
    runtime.require(outline, ("transformer", "vae"), " and ".join(map(str, source)))
    encoders = [name for name in tasks.ENCODERS if getattr(outline.config, name) is not None]
    check_encoders(encoders, outline.tokenizers)
    images = train_data.images(argparse.Namespace(**vars(arguments), part="transformer"), outline, say)
    views = view_options.views(arguments, outline.config, images.sizes, images.side, BUCKET_LEAST)
    for line in view_options.describe(views, outline.config):
        say(line)
    if arguments.buckets is not None:
        for line in view_options.enlarged_note(views, images.sizes, images.names):
            say(line)
    view_options.check_room(views, outline.config, Path(arguments.out))
    captions = text_table.distinct(images.captions)
    manifest = _manifest(arguments, source, outline, images, views, captions)
    cache.begin(arguments.out, manifest)
    device = runtime.device(arguments.device)

    if cache.missing(arguments.out, manifest, "text"):
        params = train_model.read(arguments, source, encoders)
        params = {name: train_model.frozen(part, device) for name, part in params.items()}
        ids = train_data.tokens(outline, captions.texts)
        dtype = getattr(torch, arguments.text_dtype) if arguments.text_dtype else None
        cache_writing.write_text(
            arguments.out, manifest, captions.texts, ids, params, outline.config, dtype, _track("encoding captions")
        )
        # The autoencoder is loaded after the encoders are freed.
        del params
    if cache.missing(arguments.out, manifest, "latents"):
        stored = train_model.read(arguments, source, ["vae"])["vae"]
        # Latents are what all else is learned from: float32, whatever the autoencoder is stored in.
        params = tree.to(tree.cast(stored, torch.float32), device)
        encode = functools.partial(datasets.encode_images, params, require(outline.config, "vae"))
        cache_writing.write_latents(
            arguments.out, manifest, images, views, captions.rows, encode, _track("encoding images")
        )
    written = sum(path.stat().st_size for path in Path(arguments.out).glob("*.safetensors"))
    shown = f" in {manifest.views} views" if manifest.views > 1 else ""
    return (
        f"{arguments.out}: {manifest.images} images{shown}, {manifest.texts - 1} captions, {written / 2**20:,.1f} MiB; "
        f"functional-sd3 train --data {arguments.out} reads it"
    )


def _manifest(
    arguments: argparse.Namespace,
    source: list[Path],
    outline: Model,
    images: TrainingImages,
    views: Views,
    captions: text_table.Captions,
) -> cache.Manifest:
    changes = view_options.changes(arguments)
    if arguments.text_dtype:
        changes["text_dtype"] = arguments.text_dtype
    options: dict = {"changes": changes}
    if arguments.buckets is None:
        options["size"] = images.side
    factor = vae.factor(require(outline.config, "vae"))
    return cache.Manifest(
        sketch.sketch(source, only=ENCODED, variant=arguments.variant),
        images.contents,
        images.fingerprint,
        options,
        tuple((height // factor, width // factor) for width, height in views.buckets.sizes),
        len(images.captions),
        len(captions.texts),
        views.count,
        train_data.t5_length(outline),
        arguments.shard,
    )


def _track(words: str) -> Callable:
    from tqdm import tqdm

    return lambda numbers: tqdm(numbers, desc=words, leave=False, disable=not report.has_bars())
