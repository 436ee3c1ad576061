"""`train --data CACHE`: latents and text from a cache, in place of images, the VAE's encoder and the text encoders."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from functional_sd3 import pipeline
from functional_sd3.cli import train_model, view_options
from functional_sd3.cli.train_data import tokens
from functional_sd3.core import prng
from functional_sd3.formats.errors import WeightsError
from functional_sd3.layouts.components import require
from functional_sd3.pipeline.encoding import EncodedPrompts
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import cache, digests, tasks, training_set
from functional_sd3.weights import sketch
from functional_sd3.weights.model import Model

ENCODED = (*tasks.ENCODERS, "vae")
"""The components that a cache is made by."""
_OF_IMAGES = ("caption", "follow", "masks", "control", "inversion", "prior_data", "prior_images")
"""Options that need the images or the encoders of --data."""


class CachedImages(NamedTuple):
    """A cache in place of `TrainingImages`."""

    cache: cache.Cache
    captions: tuple[str, ...]
    fingerprint: str
    contents: str


def open_images(arguments: argparse.Namespace, source: Sequence[Path]) -> CachedImages | None:
    """The cache that --data names, None where it names images.

    Raises WeightsError where the cache is not whole or another model made it, ValueError for options that it has no use
    for.
    """
    if arguments.data == "shapes" or not cache.is_cache(arguments.data):
        return None
    if arguments.part == "vae":
        raise ValueError(f"--data {arguments.data} is a cache of latents, and --part vae learns from images")
    given = {*getattr(arguments, "given", ()), *(name for name in _OF_IMAGES if getattr(arguments, name))}
    for name in (*_OF_IMAGES, "template"):
        if name in given:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is for images; --data {arguments.data} is a cache, made by the command cache")
    if view_options.has_views(arguments):
        raise ValueError(
            f"--buckets, --crops and --flips are for images; --data {arguments.data} is a cache: they are options of "
            "the command that made it"
        )
    whole = cache.open_cache(arguments.data)
    manifest = whole.manifest
    _check_model(arguments, source, manifest)
    if arguments.validation is not None and not arguments.validation.isdecimal():
        raise ValueError(f"--validation {arguments.validation}: of a cache give a number of images to hold out")
    if arguments.size is not None and manifest.options.get("size") != arguments.size:
        raise ValueError(
            f"--size {arguments.size}: --data {arguments.data} is a cache of images of {_size_words(manifest)}; leave "
            "--size out, or make a cache of that size with functional-sd3 cache"
        )
    texts = cache.texts(whole)
    # With these options training from the images is the same to the bit.
    is_plain = not manifest.options.get("changes")
    contents = manifest.data if is_plain else digests.combined([manifest.data, manifest.contents])
    return CachedImages(whole, tuple(texts[row] for row in whole.captions.tolist()), manifest.fingerprint, contents)


def components(arguments: argparse.Namespace, images: CachedImages) -> list[str]:
    """The components that a run on a cache reads: the VAE for samples, encoders where they learn."""
    encoders = [name for name in tasks.ENCODERS if name in images.cache.manifest.model]
    learn = encoders if train_model.text_encoders(vars(arguments)) == "train" else []
    return [*learn, "transformer", *(["vae"] if arguments.sample_every else [])]


def without_encoder(model: Model) -> Model:
    """The model with the decoder alone of its VAE."""
    if "vae" not in model.params:
        return model
    return model._replace(params={**model.params, "vae": {"decoder": model.params["vae"]["decoder"]}})


def training_data(images: CachedImages, model: Model, learns_text: bool) -> training_set.TrainingSet:
    """Latents and text of a cache; learns_text: text as tokens, which the trained encoders read.

    Raises WeightsError where the transformer does not take them.
    """
    latents, network = cache.latents(images.cache), require(model.config, "transformer")
    text = cache.text(images.cache)
    channels = latents.fetch(torch.zeros(1, dtype=torch.int64, device="cpu")).shape[1]
    theirs = (channels, text.empty["context"].shape[-1], text.empty["pooled"].shape[-1])
    ours = (network.in_channels, network.context_width, network.pooled_width)
    if theirs != ours:
        raise WeightsError(
            f"{images.cache.folder}: holds latents of {theirs[0]} channels and text of widths {theirs[1]} and "
            f"{theirs[2]}; the transformer of --params reads {ours[0]}, {ours[1]} and {ours[2]}"
        )
    longest, patch = network.position_size * network.patch_size, network.patch_size
    if wrong := [size for size in images.cache.manifest.sizes if max(size) > longest or any(s % patch for s in size)]:
        raise WeightsError(
            f"{images.cache.folder}: holds latents of {wrong[0][0]} x {wrong[0][1]}; the transformer of --params reads "
            f"multiples of {patch} up to {longest}"
        )
    if learns_text:
        text = training_set.token_text(tokens(model, images.captions), tokens(model, [""]))
    return training_set.TrainingSet(latents, text)


def generate(images: CachedImages) -> tasks.Generate:
    """Images of captions of the cache by their conditioning there, as `pipeline.generate` draws them."""
    first_image = {caption: index for index, caption in reversed(list(enumerate(images.captions)))}
    text = cache.text(images.cache)

    def draw(params, config, tokenizers, prompts, key, *, height, width, t5_length):
        used = list(dict.fromkeys(prompts))
        parts = [
            text.empty,
            text.fetch(torch.tensor([first_image[prompt] for prompt in used], dtype=torch.int64, device="cpu")),
        ]
        table = Conditioning(*(torch.cat([part[name] for part in parts]) for name in parts[0]))
        rows = torch.tensor([1 + used.index(prompt) for prompt in prompts], dtype=torch.int64, device="cpu")
        request = pipeline.Request(list(prompts), key, height=height, width=width)
        encoded = EncodedPrompts(table, rows, torch.zeros_like(rows))
        prepared = pipeline.Prepared(request, encoded, keys=prng.sample_keys(key, len(prompts)))
        return pipeline.draw(params, config, prepared)

    return draw


def _check_model(arguments: argparse.Namespace, source: Sequence[Path], manifest: cache.Manifest) -> None:
    """Raises WeightsError where --params has another autoencoder or text encoder than the cache was made with."""
    ours = sketch.sketch(source, only=ENCODED, variant=arguments.variant)
    other = [name for name, value in ours.items() if manifest.model.get(name) != value]
    if other:
        raise WeightsError(
            f"{arguments.data}: was made by another model: its {' and '.join(other)} differ from those "
            f"of {' and '.join(map(str, source))}; make a cache of this model with functional-sd3 cache"
        )


def _size_words(manifest: cache.Manifest) -> str:
    size = manifest.options.get("size")
    return f"{size} x {size} pixels" if size else "several sizes"
