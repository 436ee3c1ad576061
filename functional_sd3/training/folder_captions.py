"""The images of a folder and their captions, by the rules of `captions`; nothing of the images is read."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from functional_sd3.formats.printable import escape, named, shorten
from functional_sd3.image import files
from functional_sd3.image.folders import Skipped
from functional_sd3.training import captions as caption_files
from functional_sd3.training.folders import Listing

_MASK = "-masklabel"


class Sample(NamedTuple):
    """An image, relative to the folder, and its caption."""

    path: str
    caption: str


class Gathered(NamedTuple):
    """Samples of a folder in no order, files that were skipped, and sentences on what was left out or in conflict."""

    samples: list[tuple[Sample, str]]
    """Each with words for the source of its caption, "" where there is none."""
    skipped: list[Skipped]
    notes: list[str]


def gather(listing: Listing, template: str) -> Gathered:
    """Images of a listing with their captions; template: for captions made of the names of folders."""
    metadata_files = _metadata_files(listing.names)
    suffixes = files.suffixes()
    images = [name for name in listing.names if Path(name).suffix.lower() in suffixes]
    notes = []
    if "" not in metadata_files and "train" in metadata_files:
        others = [name for name in images if not name.startswith("train/")]
        images = [name for name in images if name.startswith("train/")]
        metadata_files = {place: name for place, name in metadata_files.items() if name.startswith("train/")}
        if others:
            notes.append(f"train/ has metadata of its own and is the set; left out: {named(others)}")
    masks = _masks_of_others(images)
    if masks:
        images = [name for name in images if name not in masks]
        notes.append(f"masks of OneTrainer's ({_MASK}) are no images of the set, so left out: {named(sorted(masks))}")
    unknown = [name for name in listing.names if Path(name).suffix.lower() in files.NOT_READ - suffixes]
    if unknown:
        notes.append(f"are in formats that are not read, convert them to PNG or JPEG: {named(unknown)}")
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
        notes.append(f"{escape(name)} does not list, so left out: {named(left)}")
    if conflicts:
        notes.append(f"several captions that differ, of which the first by the order of precedence is used: "
                     f"{named(conflicts)}")  # fmt: skip
    if repeated:
        notes.append(f"listed more than once, of which the first caption is used: {named(repeated)}")
    numbered = {PurePosixPath(image).parent.name: number for image in images
                if (number := caption_files.repeats(image)) is not None}  # fmt: skip
    if len(set(numbered.values())) > 1:
        notes.append("numbers before the names of folders are no repeats here, as they are kohya's: each image comes "
                     "once an epoch (images of the class are for --prior-data): "
                     f"{named(sorted(numbered), 'folders')}")  # fmt: skip
    known = {*metadata_files.values(), *sidecars.read}
    unread = [name for name in listing.names
              if Path(name).suffix.lower() in caption_files.LIKE_CAPTIONS and name not in known]  # fmt: skip
    if unread:
        notes.append(f"look like captions and were not read: {named(unread, 'files')}")
    return Gathered(samples, skipped, notes)


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
