"""Conditioning of the captions of a set, each distinct one encoded once.

Captions are encoded in groups of `GROUP`, which begin at multiples of it, whoever encodes them: a row of a product may
depend in its last bits on how many rows there are, and training from memory and from a cache is to be the same.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Params
from functional_sd3.layouts.components import Config
from functional_sd3.text import conditioning
from functional_sd3.text.conditioning import Conditioning, Ids
from functional_sd3.training.training_set import Text

GROUP = 16
"""Captions that are encoded together."""


class Captions(NamedTuple):
    """Distinct texts, the empty one first, and for each image the row of its own, int64 (images,)."""

    texts: tuple[str, ...]
    rows: Tensor


def distinct(captions: Sequence[str]) -> Captions:
    """The captions of images as rows of a table."""
    texts = tuple(dict.fromkeys(("", *captions)))
    row = {text: index for index, text in enumerate(texts)}
    return Captions(texts, torch.tensor([row[caption] for caption in captions], dtype=torch.int64, device="cpu"))


def encode(
    params: Params,
    config: Config,
    ids: Ids,
    *,
    dtype: torch.dtype | None = None,
    track: Callable[[Iterable[range]], Iterable[range]] = iter,
) -> Conditioning:
    """Conditioning of the tokens of texts, on the CPU, without gradients.

    ids: of texts whose first is a multiple of `GROUP` in their table. dtype: of the result, None for the encoders'.
    track: wraps the iteration over groups, as tqdm does.
    """
    device = tree.leaves(params)[0].device
    parts = []
    with torch.no_grad():
        for rows in track([range(start, min(start + GROUP, len(ids.t5))) for start in range(0, len(ids.t5), GROUP)]):
            some = Ids(*(part[rows.start : rows.stop].to(device) for part in ids))
            parts.append(tree.map(lambda part: part.to("cpu", dtype), conditioning.encode(params, config, some)))
    return Conditioning(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def row_bytes(params: Params, config: Config, ids: Ids) -> int:
    """Bytes of the conditioning of one text."""
    return tree.nbytes(encode(params, config, Ids(*(part[:1] for part in ids))))


def resident(table: Conditioning, rows: Tensor, t5_length: int) -> Text:
    """The text of images whose captions are `rows` of a table in memory."""

    def fetch(images: Tensor) -> dict[str, Tensor]:
        return {name: part[rows[images]] for name, part in table._asdict().items()}

    return Text(fetch, {name: part[:1] for name, part in table._asdict().items()}, t5_length)
