"""The manifest of a cache of an encoded training set: `cache.json`, with the origin of the cache."""

import functools
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from functional_sd3.formats import files, json_fields
from functional_sd3.formats.errors import WeightsError
from functional_sd3.training import digests

MANIFEST = "cache.json"
ROWS = 256
"""Images, or captions, of a shard."""
_VERSION = 1
_MOST_ROWS = 2**40


@dataclass(frozen=True)
class Manifest:
    """Origin of a cache.

    model: `weights.sketch` of the autoencoder and of every text encoder. data: digest of the images' bytes and
    captions. fingerprint: of names and captions. options: "size" of all
    images where they have one, and "changes", the options by which training differs from training without a cache.
    sizes: (height, width) of the latents of each bucket. images, texts: rows of latents and of text (0: latents alone).
    rows: of a shard.
    """

    model: dict[str, str]
    data: str
    fingerprint: str
    options: dict[str, Any]
    sizes: tuple[tuple[int, int], ...]
    images: int
    texts: int
    views: int
    t5_length: int
    rows: int = ROWS

    @property
    def contents(self) -> str:
        """Digest of all fields, which every shard names."""
        return digests.combined([json.dumps(asdict(self), sort_keys=True)])


def is_cache(folder: str | os.PathLike) -> bool:
    """True for a folder that holds a cache, or the beginning of one."""
    return (Path(folder) / MANIFEST).is_file()


def begin(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Write the manifest of a new cache; an existing one is not changed.

    Raises WeightsError where the folder holds a cache of something else, naming what differs.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        content = json.dumps({"version": _VERSION, **asdict(manifest)}, indent=1, sort_keys=True)
        files.write_atomic(path, (content + "\n").encode())
        return
    if different := _differences(read_manifest(folder), manifest):
        raise WeightsError(f"{folder} holds a cache of other {' and '.join(different)}: name a new folder with --out")


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """The manifest of a cache. Raises WeightsError, naming the field, where it cannot be read."""
    path = Path(folder) / MANIFEST
    entries = json_fields.read(path)
    if entries.integer("version") != _VERSION:
        raise entries.error("version", f"must be {_VERSION}: a cache of another version is made anew")
    sizes = entries.items("sizes", kind=list)
    if not sizes or not all(len(size) == 2 and all(type(side) is int and side > 0 for side in size) for size in sizes):
        raise entries.error("sizes", "must be a list of pairs of sides")
    model, whole = entries.mapping("model"), functools.partial(entries.integer, low=1, high=_MOST_ROWS)
    return Manifest(
        {name: model.text(name) for name in model.values},
        entries.text("data"),
        entries.text("fingerprint"),
        dict(entries.mapping("options").values),
        tuple((height, width) for height, width in sizes),
        **{name: whole(name) for name in ("images", "views", "t5_length", "rows")},
        texts=entries.integer("texts", low=0, high=_MOST_ROWS),
    )


def _differences(one: Manifest, other: Manifest) -> list[str]:
    """Words for the fields that differ, with the values of options."""
    names = [each.name for each in fields(Manifest) if getattr(one, each.name) != getattr(other, each.name)]
    before, now = _option_values(one), _option_values(other)
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    options = "; ".join(f"{name} {before.get(name)}, now {now.get(name)}" for name in changed)
    words = [*(_WORDS[name] for name in names if name in _WORDS), *([f"options ({options})"] if changed else [])]
    return list(dict.fromkeys(words)) or names


_WORDS = {
    "model": "encoders",
    "t5_length": "encoders",
    **dict.fromkeys(("data", "fingerprint", "images", "texts"), "images or captions"),
}
"""Differences in fields that are not options; the others follow from these."""


def _option_values(manifest: Manifest) -> dict[str, Any]:
    changes = manifest.options.get("changes")
    values = {**manifest.options, **(changes if isinstance(changes, dict) else {}), "shard": manifest.rows}
    return {name.replace("_", "-"): value for name, value in values.items() if name != "changes"}
