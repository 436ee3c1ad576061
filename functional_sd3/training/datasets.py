"""Folders of pictures with captions, as an index and functions of it; latents computed once.

`image_folder` finds the pictures and their captions, `load` makes one of them a tensor, `encode_all` turns the whole
set into what the transformer is trained on.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy
import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Params, Tree
from functional_sd3.formats.printable import shorten
from functional_sd3.image import files, pixels, vae
from functional_sd3.image.pictures import Skipped
from functional_sd3.text import conditioning

if TYPE_CHECKING:
    from PIL.Image import Image

METADATA = "metadata.jsonl"


class Sample(NamedTuple):
    """A picture, relative to the folder, and what it is said to show."""

    path: str
    caption: str


class Index(NamedTuple):
    """The samples of a folder in the order of their paths, and the files that were skipped."""

    folder: Path
    samples: tuple[Sample, ...]
    skipped: tuple[Skipped, ...]


def image_folder(folder: str | os.PathLike, *, template: str = "a photo of a {}") -> Index:
    """The pictures below a folder. A caption comes from the first of these that there is:

    - `metadata.jsonl` in the folder, with a line {"file_name": ..., "text": ...} for every picture of the set;
    - a text file beside the picture, `cat.txt` for `cat.jpg`;
    - the name of the class folder it lies in, put into `template` with spaces for underscores and hyphens;
    - the empty caption, for a picture at the top.

    Every picture is read once; a file that cannot be is left out and listed in `skipped`. Hidden files are passed by.
    Raises ValueError when the folder is not there, has no readable picture, or a metadata line is not of that form.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of pictures" if folder.exists() else f"{folder} does not exist")
    _check_template(template)
    if (folder / METADATA).is_file():
        samples, skipped = list(_described(folder / METADATA)), []
    else:
        samples, skipped = _captioned(folder, template)
    readable = []
    for sample in samples:
        try:
            files.read(folder / sample.path)
            readable.append(sample)
        except ValueError as error:
            skipped.append(Skipped(sample.path, str(error)))
    if not readable:
        known = ", ".join(sorted(files.suffixes()))
        unread = f"; {len(skipped)} files could not be read, the first: {': '.join(skipped[0])}" if skipped else ""
        raise ValueError(f"{folder} holds no pictures ({known}){unread}")
    return Index(folder, tuple(readable), tuple(skipped))


def load(index: Index, i: int, size: int) -> Tensor:
    """Picture `i` as uint8 (3, size, size): turned upright, over white, shorter side to `size`, middle cut out.

    Raises ValueError naming the file when it cannot be read any more.
    """
    path = index.folder / index.samples[i].path
    try:
        picture = files.read(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return torch.from_numpy(numpy.array(square(picture, size), dtype=numpy.uint8)).permute(2, 0, 1).contiguous()


def load_batch(index: Index, rows: Sequence[int], size: int) -> Tensor:
    """Several pictures, uint8 (batch, 3, size, size)."""
    return torch.stack([load(index, int(row), size) for row in rows])


def encode_all(
    params: Params,
    config: conditioning.Config,
    tokenizers: conditioning.Tokenizers,
    captions: Sequence[str],
    pictures: Callable[[range], Tensor],
    *,
    batch: int = 16,
    t5_length: int = 256,
    track: Callable[[Iterator[range]], Iterator[range]] = iter,
) -> Tree:
    """{"latents": (pictures, channels, h, w), "ids"}: what `losses.flow_loss` reads, for a whole set, on the CPU.

    `pictures(rows)` gives uint8 (len(rows), 3, side, side). Latents are the means of their posteriors, normalised.
    `track` wraps the iteration over batches, as tqdm does.
    """
    like = tree.leaves(params["vae"])[0]
    starts = range(0, len(captions), batch)
    latents = []
    with torch.no_grad():
        for rows in track([range(start, min(start + batch, len(captions))) for start in starts]):
            images = pixels.to_signed(pixels.from_bytes(pictures(rows)))
            mean = vae.encode(params["vae"], config.vae, images.to(like.device, like.dtype)).mean
            latents.append(vae.normalize(config.vae, mean.float()).cpu())
    return {
        "latents": torch.cat(latents),
        "ids": conditioning.tokenize(config, tokenizers, captions, t5_length=t5_length),
    }


def _described(path: Path) -> Iterator[Sample]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                name, text = entry["file_name"], entry["text"]
            except (ValueError, KeyError, TypeError):
                name = text = None
            if not isinstance(name, str) or not isinstance(text, str):
                wanted = '{"file_name": "...", "text": "..."}'
                raise ValueError(f"{path}, line {number} must be {wanted}, not {line[:80]!r}")
            yield Sample(name, text)


def _captioned(folder: Path, template: str) -> tuple[list[Sample], list[Skipped]]:
    samples, skipped = [], []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root) / name
            if name.startswith(".") or path.suffix.lower() not in files.suffixes():
                continue
            relative = path.relative_to(folder).as_posix()
            try:
                samples.append(Sample(relative, _caption(path, folder, template)))
            except (OSError, UnicodeDecodeError) as error:
                skipped.append(Skipped(relative, f"its caption cannot be read: {error}"))
    return sorted(samples), skipped


def _caption(path: Path, folder: Path, template: str) -> str:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        return " ".join(beside.read_text(encoding="utf-8").split())
    if path.parent == folder:
        return ""
    # Not str.format, whose fields reach into objects.
    return template.replace("{}", path.parent.name.replace("_", " ").replace("-", " ").strip())


def _check_template(template: str) -> None:
    """Raises ValueError unless `{}` occurs and no other brace does."""
    if "{}" not in template:
        raise ValueError(f"template {shorten(repr(template))} must contain {{}}, where the name of the class goes")
    rest = template.replace("{}", "")
    other = re.search(r"\{[^{}]*\}?|\}", rest)
    if other:
        raise ValueError(
            f"template {shorten(repr(template))} holds {shorten(repr(other[0]), 40)}; {{}}, for the name of the class, "
            "is all that is filled in, and other braces mean nothing"
        )


def square(picture: "Image", size: int) -> "Image":
    """The picture with its shorter side resized (Lanczos) to `size` pixels and its middle cut out."""
    from PIL import Image

    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if picture.size == (size, size):
        return picture
    return picture.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
