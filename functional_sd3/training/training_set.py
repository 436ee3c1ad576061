"""Encoded training sets: latents and text of images, the order in which steps take them, and their batches.

Where latents and text are, in memory or in files, is a function of each: `fetch`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Key, Tree
from functional_sd3.text.conditioning import Ids
from functional_sd3.training import order


class Latents(NamedTuple):
    """Normalised latents of a set of images, each in `views` crops or mirror images.

    fetch: samples, int64 (batch,), of images of one bucket -> float32 (batch, channels, height, width) on the CPU;
    sample i is view i % views of image i // views. buckets: the number of every image's bucket, from 0. size: (height,
    width) of the latents of images drawn in between.
    """

    fetch: Callable[[Tensor], Tensor]
    buckets: tuple[int, ...]
    size: tuple[int, int]
    views: int = 1


class Text(NamedTuple):
    """Text of a set of images.

    fetch: images, int64 (batch,) -> {"ids"}, or {"context", "pooled"}, each (batch, ...), on the CPU. empty: the same
    of the empty prompt, (1, ...). t5_length: tokens that T5 reads.
    """

    fetch: Callable[[Tensor], Tree]
    empty: Tree
    t5_length: int


def _nothing(samples: Tensor) -> Tree:
    return {}


class TrainingSet(NamedTuple):
    """Latents and text of the same images.

    extra: samples, as in `Latents.fetch` -> further entries of a batch, (batch, ...) on the CPU: "mask", "control".
    """

    latents: Latents
    text: Text
    extra: Callable[[Tensor], Tree] = _nothing


def resident(latents: Tensor) -> Latents:
    """Latents (images, channels, height, width) in memory, one view of each image."""
    height, width = latents.shape[-2:]
    return Latents(lambda samples: latents[samples], (0,) * len(latents), (height, width))


def token_text(ids: Ids, empty: Ids) -> Text:
    """Token ids (images, length) in memory, which encoders read at every step; empty: of the empty prompt."""
    return Text(lambda rows: {"ids": tree.map(lambda part: part[rows], ids)}, {"ids": empty}, ids.t5.shape[1])


def sample_order(data: TrainingSet, key: Key, batch: int) -> Callable[[int], Tensor]:
    """step -> samples of its whole batch, int64 (batch,), for `Latents.fetch`: a function of the key and the step.

    The samples are those of all processes together: process r of n takes samples r * batch / n to (r + 1) * batch / n.
    """
    latents = data.latents
    if len(set(latents.buckets)) > 1:
        rows = order.of_buckets(key, batch, latents.buckets)
    else:
        rows = order.of_one_size(key, batch, len(latents.buckets))
    return order.with_views(rows, key, latents.views)


def batch_of(data: TrainingSet, samples: Tensor) -> Tree:
    """{"latents", and "ids" or "context" and "pooled", and what is extra} of samples, on the CPU."""
    images = samples if data.latents.views == 1 else torch.div(samples, data.latents.views, rounding_mode="floor")
    return {"latents": data.latents.fetch(samples)} | data.text.fetch(images) | data.extra(samples)


def commonest(buckets: Sequence[int]) -> list[int]:
    """The images of the bucket that most of them have; buckets: the number of every image's."""
    most = max(sorted(set(buckets)), key=Counter(buckets).__getitem__)
    return [image for image, bucket in enumerate(buckets) if bucket == most]


def subset(data: TrainingSet, images: Sequence[int]) -> TrainingSet:
    """The set of some images, by their numbers, in this order. Raises ValueError for none."""
    if not images:
        raise ValueError("a training set needs at least one image")
    rows = torch.tensor(list(images), dtype=torch.int64, device="cpu")
    views = data.latents.views

    def samples(chosen: Tensor) -> Tensor:
        return rows[torch.div(chosen, views, rounding_mode="floor")] * views + chosen % views

    latents = data.latents._replace(
        fetch=lambda chosen: data.latents.fetch(samples(chosen)),
        buckets=tuple(data.latents.buckets[row] for row in images),
    )
    text = data.text._replace(fetch=lambda chosen: data.text.fetch(rows[chosen]))
    return TrainingSet(latents, text, lambda chosen: data.extra(samples(chosen)))
