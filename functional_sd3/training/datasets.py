"""Folders of captioned images as an index; images as tensors; latents of a whole set.

`image_folder` finds the images and their captions, `load` reads one as a tensor, `encode_all` computes latents and ids
of a whole set.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Params, Tree
from functional_sd3.formats.printable import escape, shorten
from functional_sd3.image import cuts, files, pixels, vae
from functional_sd3.image.folders import Skipped
from functional_sd3.layouts.components import Config, require
from functional_sd3.text import conditioning
from functional_sd3.training import captions as caption_files
from functional_sd3.training.folders import Listing, list_files

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_NAMED = 5
_MASK = "-masklabel"
_ADVICE = (
    "captions are read from metadata.jsonl or metadata.csv (file_name, text), from name.txt, name.caption or name.json "
    "beside an image, and from the names of folders; --caption TEXT is one for all"
)


class Sample(NamedTuple):
    """An image, relative to the folder, and its caption."""

    path: str
    caption: str


class Index(NamedTuple):
    """The samples of a folder in the order of their paths, and the files that were skipped.

    `sources` counts where captions came from; `notes` are sentences on what was left out or stands in conflict;
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
    gathered = _gather(listing, template)
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
        return f"{len(index.samples)} images in {escape(index.folder)}"
    count, empty = len(index.samples), sum(not sample.caption.strip() for sample in index.samples)
    sources = ", ".join(f"{number} {source}" for source, number in index.sources if source)
    start = f"{count} images in {escape(index.folder)}, "
    if not empty:
        return f"{start}all with captions ({sources})"
    return f"{start}{empty} of {count} images have no caption{f' ({sources})' if sources else ''}; {index.advice}"


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


def load_batch(index: Index, rows: Sequence[int], size: int) -> Tensor:
    """Several images, uint8 (batch, 3, size, size)."""
    return torch.stack([load(index, int(row), size) for row in rows])


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
        raise ValueError(f"template {shorten(repr(template))} must contain {{}}, where the name of the class goes")
    other = re.search(r"\{[^{}]*\}?|\}", template.replace("{}", ""))
    if other:
        raise ValueError(
            f"template {shorten(repr(template))} holds {shorten(repr(other[0]), 40)}; {{}}, for the name of the class, "
            "is all that is filled in, and other braces mean nothing"
        )


class _Gathered(NamedTuple):
    samples: list[tuple[Sample, str]]
    """Each with words for the source of its caption, "" where there is none."""
    skipped: list[Skipped]
    notes: list[str]


def _gather(listing: Listing, template: str) -> _Gathered:
    """Images and captions by the rules of `captions`; nothing of the images is read."""
    metadata_files = _metadata_files(listing.names)
    suffixes = files.suffixes()
    images = [name for name in listing.names if Path(name).suffix.lower() in suffixes]
    notes = []
    if "" not in metadata_files and "train" in metadata_files:
        others = [name for name in images if not name.startswith("train/")]
        images = [name for name in images if name.startswith("train/")]
        metadata_files = {place: name for place, name in metadata_files.items() if name.startswith("train/")}
        if others:
            notes.append(f"train/ has metadata of its own and is the set; left out: {_named(others)}")
    masks = _masks_of_others(images)
    if masks:
        images = [name for name in images if name not in masks]
        notes.append(f"masks of OneTrainer's ({_MASK}) are no images of the set, so left out: {_named(sorted(masks))}")
    unknown = [name for name in listing.names if Path(name).suffix.lower() in files.NOT_READ - suffixes]
    if unknown:
        notes.append(f"are in formats that are not read, convert them to PNG or JPEG: {_named(unknown)}")
    sidecars = caption_files.Sidecars(listing.folder, listing.names)
    samples, skipped, conflicts, repeated = [], [], [], []
    unlisted: dict[str, Any] = {}
    described: dict[str, str] = {}
    deepest_first = sorted(metadata_files.items(), key=lambda item: (-item[0].count("/") - bool(item[0]), item))
    for place, name in deepest_first:
        for entry in caption_files.metadata(listing.folder / name, escape(listing.folder / name)):
            path, reason = listing.resolve(place, entry.name)
            if path is None:
                skipped.append(Skipped(shorten(entry.name, 200), reason or ""))
            elif path in described:
                repeated.append(path)
            else:
                described[path] = entry.text
                samples.append((Sample(path, entry.text), f"in {PurePosixPath(name).name}" if entry.text else ""))
    for image in images:
        if refusal := listing.refusal(image):
            skipped.append(Skipped(image, refusal))
            continue
        try:
            nearest = _nearest(image, metadata_files)
            for name in sidecars.files(image):
                if refusal := listing.refusal(name):
                    raise ValueError(f"{name} {refusal}")
            if nearest is not None and image not in described:
                unlisted.setdefault(metadata_files[nearest], []).append(image)
                continue
            caption = sidecars.caption(image)
            if image in described:
                if caption is not None and caption.text != " ".join(described[image].split()):
                    conflicts.append(image)
            elif caption is not None:
                conflicts += [image] if caption.others else []
                samples.append((Sample(image, caption.text), "beside the image" if caption.text else ""))
            else:
                words = caption_files.folder_name(image)
                # Not str.format, whose fields reach into objects.
                text = template.replace("{}", words) if words else ""
                samples.append((Sample(image, text), "by the name of the folder" if text else ""))
        except ValueError as error:
            skipped.append(Skipped(image, f"its caption cannot be read: {error}"))
    for name, left in unlisted.items():
        notes.append(f"{escape(name)} does not list, so left out: {_named(left)}")
    if conflicts:
        notes.append(f"several captions that differ, of which the first by the order of precedence is used: "
                     f"{_named(conflicts)}")  # fmt: skip
    if repeated:
        notes.append(f"listed more than once, of which the first caption is used: {_named(repeated)}")
    known = {*metadata_files.values(), *sidecars.read}
    unread = [name for name in listing.names
              if Path(name).suffix.lower() in caption_files.LIKE_CAPTIONS and name not in known]  # fmt: skip
    if unread:
        notes.append(f"look like captions and were not read: {_named(unread, 'files')}")
    return _Gathered(samples, skipped, notes)


def _masks_of_others(images: Sequence[str]) -> set[str]:
    """The masks that OneTrainer keeps beside the images they belong to."""
    stems = {os.path.splitext(name)[0] for name in images}
    marked = ((name, os.path.splitext(name)[0]) for name in images)
    return {name for name, stem in marked if stem.endswith(_MASK) and stem.removesuffix(_MASK) in stems}


def _metadata_files(names: Sequence[str]) -> dict[str, str]:
    """Folder -> its file of metadata, relative to the set; "" is the set's own folder."""
    metadata: dict[str, str] = {}
    for kind in caption_files.METADATA:
        for name in names:
            place, _, file = name.rpartition("/")
            if file == kind:
                metadata.setdefault(place, name)
    return metadata


def _nearest(image: str, metadata_files: dict[str, str]) -> str | None:
    """The nearest folder above an image that has a file of metadata."""
    place = image
    while place:
        place = place.rpartition("/")[0]
        if place in metadata_files:
            return place
    return None


def _named(names: Sequence[str], unit: str = "images") -> str:
    shown = ", ".join(shorten(name, 60) for name in names[:_MAX_NAMED])
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{len(names)} {unit if len(names) != 1 else unit.removesuffix('s')} ({shown}{more})"
