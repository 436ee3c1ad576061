"""Training images in tar files of webdataset's layout: an index of where each member lies, and reading at random.

Members that share a name up to the first dot of its last part are one sample: `000123.jpg` and `000123.txt`, or
`.caption`, `.json` (its `text`, `caption` or `prompt`) or `.cls` (a class, for the template), in this order of
precedence. Tars are never extracted: a name is a key and never a path, so it may hold anything. An index of offsets
makes a tar a set of images like a folder, with the same order, resumption and digests; compressed tars have no offsets
and are refused.

The layout: https://github.com/webdataset/webdataset.
"""

import glob
import io
import itertools
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from functional_sd3.formats import bounded
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.printable import counted, shorten
from functional_sd3.image import files
from functional_sd3.image.folders import Skipped
from functional_sd3.training import captions as caption_files
from functional_sd3.training import datasets
from functional_sd3.training.datasets import Index, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

CAPTIONS = ("txt", "caption", "json", "cls")
"""Extensions of a sample's caption, in order of precedence."""
_ADVICE = (
    "the caption of 000123.jpg is read from 000123.txt, 000123.caption, 000123.json or 000123.cls in its tar; "
    "--caption TEXT is one for all"
)
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_RANGE = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
_MOST_FILES = 2**17
_MAX_HEADER = 2**24
_MAX_CAPTION = 2**18
_BLOCK = 512


class Place(NamedTuple):
    """Place of a member in a tar, uncompressed: its name, the offset of its first byte and its size in bytes."""

    tar: Path
    name: str
    offset: int
    size: int


class TarSet(NamedTuple):
    """The samples of tars in their order, and the places of their images."""

    listing: Index
    places: tuple[Place, ...]


def is_tars(data: str) -> bool:
    """True if `data` names tars: one, a pattern (`shards/{0000..0009}.tar`, `shards/*.tar`), or a folder that holds
    tars and no images beside them."""
    if data.lower().endswith(_SUFFIXES) and not Path(data).is_dir():
        return True
    return bool(_in_folder(Path(data)))


def paths(data: str) -> list[Path]:
    """The tars that `data` names, in the order of their numbers or names. Raises ValueError naming one that is not
    there."""
    if Path(data).is_dir():
        return _in_folder(Path(data))
    named = [data] if Path(data).exists() else list(_expanded(data))
    paths = [path for name in named for path in (sorted(glob.glob(name)) if re.search(r"[*?]", name) else [name])]
    if absent := [name for name in paths or [data] if not Path(name).exists()]:
        more = f" and {len(absent) - 1} more of {len(paths)}" if len(absent) > 1 else ""
        raise ValueError(f"--data {shorten(data, 200)}: {shorten(absent[0], 200)} does not exist{more}")
    return [Path(name) for name in paths]


def tar_set(data: str, *, template: str = "a photo of a {}", caption: str | None = None) -> TarSet:
    """The images of the tars that `data` names, with their captions, "" where there is none.

    template, caption: as in `datasets.image_folder`; the template is for classes (`.cls`). Every image is read once;
    what cannot be read is left out and listed in `listing.skipped` by tar and member. Raises ValueError for a
    compressed tar, and where no image can be read.
    """
    datasets.check_template(template)
    skipped: list[Skipped] = []
    sources: Counter[str] = Counter()
    samples, places = [], []
    tars = paths(data)
    for tar in tars:
        for key, members in _samples(tar, skipped).items():
            place = _image(members)
            if place is None:
                continue
            try:
                text, source = ("", "") if caption is not None else _caption(members, template)
                caption_files.check_characters(text)
            except ValueError as error:
                skipped.append(Skipped(_where(place), f"its caption cannot be read: {error}"))
                continue
            samples.append(Sample(f"{tar.name}/{key}.{place.name.rpartition('.')[2]}", caption or text))
            places.append(place)
            sources["--caption" if caption is not None else source] += 1
    sizes: dict[int, tuple[int, int]] = {}
    for number, (place, size) in enumerate(zip(places, _sizes(places), strict=True)):
        if isinstance(size, str):
            skipped.append(Skipped(_where(place), size))
        else:
            sizes[number] = size
    kept = list(sizes)
    if not kept:
        first = f"; {len(skipped)} could not be read, the first: {': '.join(skipped[0])}" if skipped else ""
        raise ValueError(f"{data} holds no images ({files.suffix_words()}) in {len(tars)} tars{first}")
    notes = (f"{counted(len(tars), 'tar')} in webdataset's layout",)
    index = Index(
        Path(data), tuple(samples[number] for number in kept), tuple(skipped), tuple(sources.items()), notes,
        tuple(sizes.values()), _ADVICE,
    )  # fmt: skip
    return TarSet(index, tuple(places[number] for number in kept))


def read(place: Place) -> "Image":
    """The image of a place, upright RGB. Raises ValueError naming tar and member when it cannot be read."""
    try:
        return files.read(io.BytesIO(_bytes(place, files.MAX_BYTES)))
    except ValueError as error:
        raise ValueError(f"{_where(place)}: {error}") from None


def _in_folder(folder: Path) -> list[Path]:
    """The tars of a folder that holds no images beside them."""
    if not folder.is_dir():
        return []
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    tars = sorted(path for path in entries if path.name.lower().endswith(_SUFFIXES))
    if not tars:
        return []
    suffixes = files.suffixes()
    return [] if any(path.suffix.lower() in suffixes for path in entries) else tars


def _expanded(data: str) -> Iterator[str]:
    """The names of a pattern, with each {a..b} replaced by the numbers from a to b, as wide as a is written."""
    ranges = [(match[1], int(match[1]), int(match[2])) for match in _RANGE.finditer(data)]
    count = 1
    for _, first, last in ranges:
        count *= max(last - first + 1, 0)
    if not 0 < count <= _MOST_FILES:
        raise ValueError(f"--data {shorten(data, 200)} names {count:,} tars, and must name 1 to {_MOST_FILES:,}")
    texts = _RANGE.split(data)[::3]
    numbers = itertools.product(*([str(n).zfill(len(text)) for n in range(a, b + 1)] for text, a, b in ranges))
    for chosen in numbers:
        yield "".join(itertools.chain.from_iterable(itertools.zip_longest(texts, chosen, fillvalue="")))


def _samples(tar: Path, skipped: list[Skipped]) -> dict[str, dict[str, Place]]:
    """key -> extension -> place of the members of a tar, in its order."""
    samples: dict[str, dict[str, Place]] = {}
    for place in _members(tar, skipped):
        folder, _, name = place.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if not stem or not extension:
            continue
        held = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
        if extension.lower() in held:
            skipped.append(Skipped(_where(place), "is there twice; the first is used"))
        else:
            held[extension.lower()] = place
    return samples


def _members(path: Path, skipped: list[Skipped]) -> Iterator[Place]:
    """The regular files in a tar; damage, and members that are none, are listed in `skipped`."""
    with bounded.open_file(path) as file:
        _check_kind(path, file)
        length, last = file.seek(0, io.SEEK_END), "its beginning"
        file.seek(0)
        damage = None
        try:
            with tarfile.open(fileobj=_Bounded(file), mode="r:") as archive:  # type: ignore[call-overload]
                for member in archive:
                    if not member.isreg() or member.issparse():
                        if not member.isdir():
                            skipped.append(Skipped(f"{path}: {shorten(member.name, 200)}", "is no regular file"))
                    elif member.offset_data + member.size > length:
                        skipped.append(
                            Skipped(f"{path}: {shorten(member.name, 200)}", "is cut off: the tar ends in it")
                        )
                    else:
                        yield Place(path, member.name, member.offset_data, member.size)
                    last = shorten(member.name, 200)
                    # tarfile keeps every member; the places are enough.
                    archive.members = []
                file.seek(archive.offset)
                # tarfile ignores a broken header and a missing end of the archive.
                end = file.read(_BLOCK)
                if end.strip(b"\0"):
                    damage = "a header is damaged"
                elif not end:
                    damage = "it ends without the mark of its end, so that more may be cut off"
        # Damaged headers raise errors of tarfile, of decoding and others.
        except Exception as error:
            damage = shorten(str(error) or type(error).__name__, 200)
        if damage:
            skipped.append(Skipped(str(path), f"cannot be read after {last}: {damage}"))


class _Bounded:
    """A file of which no more is read at once than headers have."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise ValueError(f"a header of {size:,} bytes")
        return self._file.read(size)


def _check_kind(path: Path, file: BinaryIO) -> None:
    start = file.read(8)
    for magic, (kind, tool) in _COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(
                f"{path} is compressed ({kind}), so that its members cannot be read at random: decompress it ({tool}); "
                "images are compressed already"
            )


def _image(members: dict[str, Place]) -> Place | None:
    """The image of a sample: the first member whose whole extension is one of images (`seg.png` is none)."""
    suffixes = files.suffixes()
    return next((place for extension, place in members.items() if f".{extension}" in suffixes), None)


def _caption(members: dict[str, Place], template: str) -> tuple[str, str]:
    """The caption of a sample and words for its source."""
    for extension in CAPTIONS:
        if extension in members:
            place = members[extension]
            text = caption_files.sidecar_text(_bytes(place, _MAX_CAPTION), f".{extension}", shorten(place.name, 200))
            if text is not None:
                return (
                    template.replace("{}", text) if extension == "cls" else text
                ), f"in .{extension}" if text else ""
    return "", ""


def _bytes(place: Place, limit: int) -> bytes:
    if place.size > limit:
        raise ValueError(f"{place.size:,} bytes, more than the {limit:,} that are read of it")
    with bounded.open_file(place.tar) as file:
        file.seek(place.offset)
        content = file.read(place.size)
    if len(content) < place.size:
        raise ValueError("is cut off: the tar ends in it")
    return content


def _sizes(places: Sequence[Place]) -> list[tuple[int, int] | str]:
    """(width, height) of each image, or why it cannot be read."""

    def size(place: Place) -> tuple[int, int] | str:
        try:
            return files.read(io.BytesIO(_bytes(place, files.MAX_BYTES))).size
        except WeightsError:
            raise
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(size, places))


def _where(place: Place) -> str:
    return f"{place.tar}: {shorten(place.name, 200)}"
