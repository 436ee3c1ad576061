"""Folders of captioned images as an index; images as tensors; latents of a whole set.

`image_folder` finds the images and their captions, `load` reads one as a tensor, `encode_all` computes latents and ids
of a whole set.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy
import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Params, Tree
from functional_sd3.formats.printable import counted, escape, shorten
from functional_sd3.image import cuts, files, pixels, vae
from functional_sd3.image.folders import Skipped
from functional_sd3.layouts.components import Config, require
from functional_sd3.text import conditioning
from functional_sd3.training import captions as caption_files
from functional_sd3.training.folder_captions import Sample, gather
from functional_sd3.training.folders import list_files

if TYPE_CHECKING:
    from PIL.Image import Image

_ADVICE = (
    "captions are read from metadata.jsonl or metadata.csv (file_name, text), from name.txt, name.caption or name.json "
    "beside an image, and from the names of folders; --caption TEXT is one for all"
)


class Index(NamedTuple):
    """The samples of a folder in the order of their paths, and the files that were skipped.

    `sources` counts where captions came from; `notes` are sentences on what was left out or is in conflict;
    `sizes`: (width, height) in pixels of each image, upright; `advice`: where captions are read from.
    """

    folder: Path
    samples: tuple[Sample, ...]
    skipped: tuple[Skipped, ...]
    sources: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    advice: str = _ADVICE


def image_folder(
    folder: str | os.PathLike, *, template: str = "a photo of a {}", caption: str | None = None, follow: bool = False
) -> Index:
    """The images below a folder, with the captions that `captions` describes, "" where there is none.

    template: for captions made of the names of folders. caption: one for all images, in place of theirs. follow: read
    files outside of the folder too, to which links and names in metadata lead. Where only the folder `train` has
    metadata, the images are those of `train` (Hugging Face's layout of splits).

    Every image is read once; a file that cannot be is left out and listed in `skipped`. Hidden files are left out.
    Raises ValueError when the folder is not there, has no readable image, or a metadata line is not of that form.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images" if folder.exists() else f"{folder} does not exist")
    check_template(template)
    listing = list_files(folder, follow=follow)
    gathered = gather(listing, template)
    samples, sizes, skipped = [], [], [*gathered.skipped]
    sources: Counter[str] = Counter()
    for sample, source in sorted(gathered.samples):
        try:
            caption_files.check_characters(sample.caption)
            size = files.read(folder / sample.path).size
            sizes.append(size)
            samples.append(sample if caption is None else sample._replace(caption=caption))
            sources[source if caption is None else "--caption"] += 1
        except ValueError as error:
            skipped.append(Skipped(shorten(sample.path, 200), str(error)))
    if not samples:
        unread = f"; {len(skipped)} files could not be read, the first: {': '.join(skipped[0])}" if skipped else ""
        noted = "".join(f"; {note}" for note in (*listing.notes, *gathered.notes)[:3])
        raise ValueError(f"{folder} holds no images ({files.suffix_words()}){unread}{noted}")
    notes = (*listing.notes, *gathered.notes)
    return Index(folder, tuple(samples), tuple(skipped), tuple(sources.items()), notes, tuple(sizes))


def summary(index: Index, *, captioned: bool = True) -> str:
    """One line: the number of images and, where `captioned`, of those without a caption, with the sources of the
    others."""
    if not captioned:
        return f"{counted(len(index.samples), 'image')} in {escape(index.folder)}"
    count, empty = len(index.samples), sum(not sample.caption.strip() for sample in index.samples)
    sources = ", ".join(f"{number} {source}" for source, number in index.sources if source)
    start = f"{counted(count, 'image')} in {escape(index.folder)}, "
    if not empty:
        return f"{start}all with captions ({sources})"
    verb = "has" if empty == 1 else "have"
    given = f" ({sources})" if sources else ""
    return f"{start}{empty} of {counted(count, 'image')} {verb} no caption{given}; {index.advice}"


def load(index: Index, i: int, size: int) -> Tensor:
    """Image `i` as uint8 (3, size, size): turned upright, over white, shorter side to `size`, middle cut out.

    Raises ValueError naming the file when it cannot be read any more.
    """
    return load_cut(index, i, cuts.Cut(size, size))


def load_cut(index: Index, i: int, cut: cuts.Cut) -> Tensor:
    """Image `i` as uint8 (3, cut.height, cut.width): turned upright, over white, cut. Raises ValueError as `load`."""
    return as_tensor(cuts.apply(open_image(index, i), cut))


def open_image(index: Index, i: int) -> "Image":
    """Image `i` in RGB, upright. Raises ValueError naming the file when it cannot be read any more."""
    path = index.folder / index.samples[i].path
    try:
        return files.read(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def as_tensor(image: "Image") -> Tensor:
    """An RGB image as uint8 (3, height, width)."""
    return torch.from_numpy(numpy.array(image, dtype=numpy.uint8)).permute(2, 0, 1).contiguous()


def encode_all(
    params: Params,
    config: Config,
    tokenizers: conditioning.Tokenizers,
    captions: Sequence[str],
    images: Callable[[range], Tensor],
    *,
    batch: int = 16,
    t5_length: int = 256,
    track: Callable[[Iterable[range]], Iterable[range]] = iter,
) -> Tree:
    """{"latents": (images, channels, h, w), "ids"} of a whole set, on the CPU, as `flow_loss` takes them.

    `images(rows)` gives uint8 (len(rows), 3, side, side). Latents are the means of their posteriors, normalised.
    `track` wraps the iteration over batches, as tqdm does.
    """
    starts, sizes = range(0, len(captions), batch), require(config, "vae")
    parts = track([range(start, min(start + batch, len(captions))) for start in starts])
    latents = [encode_images(params["vae"], sizes, images(rows)) for rows in parts]
    return {
        "latents": torch.cat(latents),
        "ids": conditioning.tokenize(config, tokenizers, captions, t5_length=t5_length),
    }


def encode_images(params: Params, config: vae.Config, images: Tensor) -> Tensor:
    """Normalised means of the posteriors of images, uint8 (batch, 3, height, width): float32, on the CPU."""
    like = tree.leaves(params)[0]
    with torch.no_grad():
        signed = pixels.to_signed(pixels.from_bytes(images))
        mean = vae.encode(params, config, signed.to(like.device, like.dtype)).mean
        return vae.normalize(config, mean.float()).cpu()


def square(image: "Image", size: int) -> "Image":
    """The image with its shorter side resized (Lanczos) to `size` pixels, centre-cropped to a square."""
    return cuts.apply(image, cuts.Cut(size, size))


def check_template(template: str) -> None:
    """Raises ValueError unless `{}` occurs and no other brace does."""
    if "{}" not in template:
        raise ValueError(
            f"template {shorten(repr(template))} (--template) must contain {{}}, where the name of the class goes"
        )
    other = re.search(r"\{[^{}]*\}?|\}", template.replace("{}", ""))
    if other:
        raise ValueError(
            f"template {shorten(repr(template))} (--template) holds {shorten(repr(other[0]), 40)}; {{}}, for the name "
            "of the class, is all that is filled in, and other braces mean nothing"
        )
