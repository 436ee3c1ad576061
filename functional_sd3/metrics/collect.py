"""Features of a stream of images: batches through a network; unreadable images are listed.

    items = folders.stream(folders.source("folder"), partial(preprocess.image, mode="clean"))
    collected = collect.statistics(collect.walk(lambda images: inception.apply(params, images)[2048], items))

The streams are lazy and the statistics are merged as they come, so memory does not grow with the number of images.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.image.folders import Item, Skipped
from functional_sd3.metrics import frechet


class Batch(NamedTuple):
    """Features (k, d) of the readable images of a batch, float32 on the CPU, and the unreadable ones; k may be 0."""

    features: Tensor
    skipped: tuple[Skipped, ...]


class Collected(NamedTuple):
    """Features (n, d), or their Frechet statistics, and the skipped files."""

    values: Tensor | frechet.Statistics
    skipped: tuple[Skipped, ...]


def walk(embed: Callable[[Tensor], Tensor], items: Iterable[Item], *, batch_size: int = 32) -> Iterator[Batch]:
    """Batches of at most `batch_size` images through `embed` (batch, ...) -> (batch, d), lazily."""
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    values: list[Tensor] = []
    skipped: list[Skipped] = []
    for item in items:
        if item.value is None:
            skipped.append(Skipped(item.name, item.reason or ""))
        else:
            values.append(item.value)
        if len(values) == batch_size:
            yield _batch(embed, values, skipped)
            values, skipped = [], []
    if values or skipped:
        yield _batch(embed, values, skipped)


def statistics(batches: Iterable[Batch]) -> Collected:
    """Frechet statistics of all batches. Raises ValueError, naming the first image, when none could be read."""
    total: frechet.Statistics | None = None
    skipped: list[Skipped] = []
    for batch in batches:
        skipped += batch.skipped
        if len(batch.features):
            part = frechet.statistics(batch.features)
            total = part if total is None else frechet.merge(total, part)
    if total is None:
        raise _no_images_error(skipped)
    return Collected(total, tuple(skipped))


def features(batches: Iterable[Batch]) -> Collected:
    """Features of all batches. Raises ValueError, naming the first image, when none could be read."""
    batches = list(batches)
    skipped = tuple(one for batch in batches for one in batch.skipped)
    parts = [batch.features for batch in batches if len(batch.features)]
    if not parts:
        raise _no_images_error(skipped)
    return Collected(torch.cat(parts), skipped)


def _batch(embed: Callable[[Tensor], Tensor], values: list[Tensor], skipped: list[Skipped]) -> Batch:
    if not values:
        return Batch(torch.empty(0, 0, dtype=torch.float32, device="cpu"), tuple(skipped))
    with torch.no_grad():
        features = embed(torch.stack(values)).float().cpu()
    return Batch(features, tuple(skipped))


def _no_images_error(skipped: Iterable[Skipped]) -> ValueError:
    skipped = tuple(skipped)
    if not skipped:
        return ValueError("there are no images")
    first = f"{skipped[0].path}: {skipped[0].reason}"
    return ValueError(f"none of {len(skipped)} images could be read; the first, {first}")
