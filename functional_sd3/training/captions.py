"""Captions of a folder of images, in the layouts that public trainers and Hugging Face's `imagefolder` read.

The caption of an image is the first of these that exists:

1. its line of `metadata.jsonl`, else of `metadata.csv`, in the nearest folder above it that has one: `file_name`,
   relative to that folder, and `text` (or `caption`, or `prompt`). Images there that it does not list are left out.
2. a file beside it, for `cat.jpg`: `cat.txt`, `cat.caption`, `cat.json` (its `text`, `caption` or `prompt`), then
   `cat.jpg.txt`, `cat.jpg.caption`, `cat.jpg.json`.
3. the name of the folder it lies in, without kohya's number of repeats, unless that is the folder of the whole set.

Text is UTF-8, or UTF-16 with a byte order mark. Files are only looked for below the folder of the set.
"""

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from functional_sd3.formats import bounded, json_fields
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.printable import escape, shorten

METADATA = ("metadata.jsonl", "metadata.csv")
SIDECAR_SUFFIXES = (".txt", ".caption", ".json")
KEYS = ("text", "caption", "prompt")
LIKE_CAPTIONS = frozenset(
    {*SIDECAR_SUFFIXES, ".captions", ".tags", ".prompt", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow"}
)
"""Suffixes of files that a trainer may take captions from; those that were not read are named."""
_REPEATS = re.compile(r"^[0-9]+_(?=.)")
_MAX_BYTES = 2**18
_MAX_METADATA = 2**29


class Caption(NamedTuple):
    """A caption, the file it was read from and the other files whose caption differs, relative to the set."""

    text: str
    file: str
    others: tuple[str, ...] = ()


class Entry(NamedTuple):
    """A line of metadata: an image, relative to the folder of the metadata, and its caption."""

    name: str
    text: str


def metadata(path: Path, where: str) -> Iterator[Entry]:
    """The lines of a `metadata.jsonl` or `metadata.csv`. Raises ValueError, naming `where` and the line."""
    is_csv = path.suffix.lower() == ".csv"
    text = decode(path, where, _MAX_METADATA)
    wanted = "file_name and text, separated by a comma" if is_csv else '{"file_name": "...", "text": "..."}'
    for number, values, problem in _rows_of_csv(text) if is_csv else _rows_of_json(text, "it"):
        fields = values if isinstance(values, dict) else {}
        name = fields.get("file_name")
        present = [key for key in KEYS if key in fields]
        # Null is no caption: another key may have one.
        captions = [fields[key] for key in present if fields[key] is not None]
        caption = _one_text(captions[0]) if captions else "" if present else None
        if problem or not isinstance(name, str) or not name or caption is None:
            reason = f": {problem}" if problem else ""
            raise ValueError(f"{where}, line {number} must be {wanted}, not {shorten(repr(values))}{reason}")
        yield Entry(name, caption)


class Sidecars:
    """Caption files beside images, among `names`, files relative to `folder`; `read`: those that were read, or
    cannot be, which is said of their images."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder = folder
        self.read: set[str] = set()
        self._by_stem: dict[str, dict[str, str]] = {}
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in SIDECAR_SUFFIXES:
                self._by_stem.setdefault(stem, {}).setdefault(suffix.lower(), name)

    def files(self, image: str) -> list[str]:
        """The sidecar files of an image, in order of precedence."""
        tables = (self._by_stem.get(stem, {}) for stem in (os.path.splitext(image)[0], image))
        return [table[suffix] for table in tables for suffix in SIDECAR_SUFFIXES if suffix in table]

    def caption(self, image: str) -> Caption | None:
        """The caption in an image's sidecar files; None without one. Raises ValueError, naming a file that cannot be
        read."""
        texts: dict[str, str] = {}
        for name in self.files(image):
            try:
                text = _read_sidecar(self.folder / name, name)
            except ValueError:
                # Other programs write .json files for other purposes: after a caption they are ignored.
                if not texts:
                    self.read.add(name)
                    raise
                continue
            if text is not None:
                texts[name] = text
                self.read.add(name)
        if not texts:
            return None
        first = next(iter(texts))
        return Caption(texts[first], first, tuple(name for name in texts if texts[name] != texts[first]))


def folder_name(image: str) -> str:
    """The words of the name of an image's folder, without kohya's number of repeats ("20_dog"); "" at the top."""
    name = PurePosixPath(image).parent.name
    return _REPEATS.sub("", name).replace("_", " ").replace("-", " ").strip()


def repeats(image: str) -> int | None:
    """Kohya's number of repeats in the name of an image's folder; None without one."""
    number = _REPEATS.match(PurePosixPath(image).parent.name)
    return int(number[0][:-1]) if number else None


def decode(path: Path, where: str, limit: int = _MAX_BYTES) -> str:
    """The text of a file without its byte order mark; ValueError, beginning with `where`."""
    try:
        return bounded.read_text(path, limit)
    except WeightsError as error:
        raise ValueError(f"{where}{str(error).removeprefix(escape(path))}") from None


def check_characters(text: str) -> None:
    """Raises ValueError for lone surrogates, which no encoding and no tokenizer has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"its caption {shorten(repr(text), 60)} holds half a character at {error.start}") from None


def _read_sidecar(path: Path, where: str) -> str | None:
    return _sidecar_text(decode(path, where), path.suffix.lower(), where)


def sidecar_text(content: bytes, suffix: str, where: str) -> str | None:
    """The caption in the content of a sidecar file; None of a .json without one. Raises ValueError, naming `where`."""
    return _sidecar_text(bounded.decode_text(content, where), suffix, where)


def _sidecar_text(content: str, suffix: str, where: str) -> str | None:
    text: str | None = content
    if suffix == ".json":
        values = json_fields.parse(content, where)
        present = [key for key in KEYS if isinstance(values, dict) and values.get(key) is not None]
        text = _one_text(values[present[0]]) if present else None
        if present and text is None:
            raise ValueError(f"{where}: {present[0]} is {shorten(repr(values[present[0]]))}, not a text")
    return None if text is None else " ".join(text.split())


def _one_text(value: Any) -> str | None:
    """A caption; of a list of captions the first, as diffusers' scripts take it when they do not draw one."""
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return value[0]
    return "" if value is None else value if isinstance(value, str) else None


def _rows_of_json(text: str, where: str) -> Iterator[tuple[int, Any, str]]:
    """Number, content and problem ("" for none) of each line."""
    # Not splitlines, which also splits at characters that JSON texts may contain.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json_fields.parse(line, where), ""
            except WeightsError as error:
                yield number, line, str(error)


def _rows_of_csv(text: str) -> Iterator[tuple[int, Any, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        for row in reader:
            extra = row.pop(None, None)
            yield reader.line_num, row, "a text with commas must be in quotes" if extra else ""
    except csv.Error as error:
        yield reader.line_num + 1, "", str(error)
