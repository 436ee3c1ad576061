"""Pairs of a better and a worse image of a prompt, listed in a file, as latents for preference optimisation.

A line of the file is a JSON object with "prompt", and "winner" and "loser": paths of images, relative to the file.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Params
from functional_sd3.formats import bounded, json_fields
from functional_sd3.formats.errors import WeightsError
from functional_sd3.image import files, pixels, vae
from functional_sd3.layouts.components import Config, require
from functional_sd3.training import datasets, digests

_MAX_BYTES = 256 * bounded.MEBIBYTE
_BATCH = 16


class Entry(NamedTuple):
    """A line of the file."""

    prompt: str
    winner: Path
    loser: Path


class Pairs(NamedTuple):
    """Prompts, and normalised latents (pairs, channels, height, width) of the better and the worse image of each."""

    prompts: tuple[str, ...]
    winner: Tensor
    loser: Tensor


def read(path: str | os.PathLike) -> list[Entry]:
    """The pairs that a file lists; blank lines are skipped.

    Raises WeightsError, naming the line, for one of another form, and where there is no pair.
    """
    entries, folder = [], Path(path).parent
    for number, line in enumerate(bounded.read_text(path, _MAX_BYTES).splitlines(), 1):
        if not line.strip():
            continue
        fields = json_fields.parse_object(line, f"{path}: line {number}")
        names = (fields.text("winner", longest=4096), fields.text("loser", longest=4096))
        entries.append(Entry(fields.text("prompt"), folder / names[0], folder / names[1]))
    if not entries:
        raise WeightsError(f"{path}: lists no pairs, which are its lines")
    return entries


def digest(entries: Sequence[Entry]) -> str:
    """Digest of the prompts and of all bytes of the images."""
    images = digests.file_digests(path for entry in entries for path in (entry.winner, entry.loser))
    return digests.combined([*(entry.prompt for entry in entries), *images])


def encode(params: Params, config: Config, entries: Sequence[Entry], size: int) -> Pairs:
    """The pairs with their images as latents, cut to squares of `size` pixels as for training.

    Raises ValueError, naming the file, for an image that cannot be read.
    """
    sizes, like = require(config, "vae"), tree.leaves(params["vae"])[0]

    def latents(paths: Sequence[Path]) -> Tensor:
        parts = []
        with torch.no_grad():
            for start in range(0, len(paths), _BATCH):
                images = torch.stack([_load(path, size) for path in paths[start : start + _BATCH]])
                signed = pixels.to_signed(pixels.from_bytes(images)).to(like.device, like.dtype)
                parts.append(vae.normalize(sizes, vae.encode(params["vae"], sizes, signed).mean.float()))
        return torch.cat(parts)

    winner, loser = latents([entry.winner for entry in entries]), latents([entry.loser for entry in entries])
    return Pairs(tuple(entry.prompt for entry in entries), winner, loser)


def _load(path: Path, size: int) -> Tensor:
    try:
        image = files.read(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return torch.from_numpy(numpy.array(datasets.square(image, size), dtype=numpy.uint8)).permute(2, 0, 1)
