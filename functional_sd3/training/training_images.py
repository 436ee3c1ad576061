"""Captioned images to train on: of a folder or of tars, read when they are needed."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from functional_sd3.image import cuts
from functional_sd3.image.cuts import Cut
from functional_sd3.training import datasets, digests, tar_shards

if TYPE_CHECKING:
    from PIL.Image import Image


class TrainingImages(NamedTuple):
    """Captioned images to train on.

    side: in pixels. load: rows -> uint8 (len(rows), 3, side, side). fingerprint: digest of names and captions.
    contents: digest of names, captions, the images' bytes and `side`. cut: (row, cut) -> uint8 (3, height, width), a
    cut of the whole image. sizes: (width, height) of each image. names: of the images, for messages.
    """

    captions: tuple[str, ...]
    load: Callable[[Sequence[int] | Tensor], Tensor]
    fingerprint: str
    contents: str
    cut: Callable[[int, Cut], Tensor]
    sizes: tuple[tuple[int, int], ...]
    names: tuple[str, ...]
    side: int


def folder_images(index: datasets.Index, side: int) -> TrainingImages:
    """The images of a folder, read when they are loaded, which raises ValueError for one that is missing or broken by
    then."""
    paths = [index.folder / sample.path for sample in index.samples]
    return _images(index, side, lambda row: datasets.open_image(index, row), paths)


def tar_images(tars: tar_shards.TarSet, side: int) -> TrainingImages:
    """The images of tars, read at random from them when they are loaded, which raises ValueError as for a folder."""
    paths = dict.fromkeys(place.tar for place in tars.places)
    return _images(tars.listing, side, lambda row: tar_shards.read(tars.places[row]), paths)


def _images(index: datasets.Index, side: int, read: Callable[[int], "Image"], paths: Iterable[Path]) -> TrainingImages:
    """paths: of the files whose bytes are digested."""
    names = [f"{sample.path}\n{sample.caption}" for sample in index.samples]

    def cut(row: int, part: Cut) -> Tensor:
        return datasets.as_tensor(cuts.apply(read(row), part))

    return TrainingImages(
        tuple(sample.caption for sample in index.samples),
        lambda rows: torch.stack([cut(int(row), Cut(side, side)) for row in rows]),
        digests.fingerprint(names),
        digests.combined([str(side), *names, *digests.file_digests(paths)]),
        cut,
        index.sizes,
        tuple(sample.path for sample in index.samples),
        side,
    )
