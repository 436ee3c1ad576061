"""Writing of caches: what a cache lacks is encoded and written, shard by shard."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core.types import Params
from functional_sd3.image.cuts import Cut
from functional_sd3.layouts.components import Config
from functional_sd3.text.conditioning import Ids
from functional_sd3.training import cache, text_table
from functional_sd3.training import views as image_views
from functional_sd3.training.cache import Manifest
from functional_sd3.training.training_images import TrainingImages
from functional_sd3.training.views import Views

Track = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps the iteration over shards, as tqdm does."""


def check_rows(rows: int) -> None:
    """Raises ValueError for rows of a shard that are no multiple of what is encoded together."""
    group = max(image_views.GROUP, text_table.GROUP)
    if rows < group or rows % group:
        raise ValueError(f"--shard {rows} must be a multiple of {group}, as so many are encoded together")


def write_text(
    folder: str | os.PathLike,
    manifest: Manifest,
    texts: Sequence[str],
    ids: Ids,
    params: Params,
    config: Config,
    dtype: torch.dtype | None,
    track: Track = iter,
) -> None:
    """Write the shards of text that a cache lacks. texts, ids: distinct captions, and their tokens; params: the text
    encoders. dtype: of what is written, None for the encoders'."""
    parts = cache.shards(manifest.texts, manifest.rows)
    for number in track(cache.missing(folder, manifest, "text")):
        rows = slice(parts[number].start, parts[number].stop)
        table = text_table.encode(params, config, Ids(*(part[rows] for part in ids)), dtype=dtype)
        cache.write_text(folder, manifest, number, texts[rows], table)


def write_latents(
    folder: str | os.PathLike,
    manifest: Manifest,
    images: TrainingImages,
    views: Views,
    captions: Tensor,
    encode: Callable[[Tensor], Tensor],
    track: Track = iter,
    image_cut: Callable[[int, Cut], Tensor] | None = None,
) -> None:
    """Write the shards of latents that a cache lacks. captions: of every image the row of its text; encode, image_cut:
    as in `views.encode`, of the images themselves by default."""
    parts = cache.shards(manifest.images, manifest.rows)
    for number in track(cache.missing(folder, manifest, "latents")):
        rows = parts[number]
        latents = image_views.encode(encode, image_cut or images.cut, views, rows)
        buckets = [views.buckets.of_image[row] for row in rows]
        names = images.names[rows.start : rows.stop]
        cache.write_latents(folder, manifest, number, latents, captions[rows.start : rows.stop], buckets, names)
