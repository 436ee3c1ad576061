"""The weights of one component in a folder: one safetensors file, or several with an index of which tensor is where.

Names as diffusers and transformers give them, of the variant "fp16" for instance: `model.fp16.safetensors`, or
`model.fp16-00001-of-00002.safetensors` with `model.safetensors.index.fp16.json` (sic; the regular name is read too).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.formats import files
from functional_sd3.formats.errors import WeightsError, attempt, reason
from functional_sd3.formats.files import Mapped
from functional_sd3.formats.header import MAX_TENSORS, too_many

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class WeightFiles(NamedTuple):
    """Tensors by name, each with the mapped file it is in; `variant`: the one found, None for the plain files."""

    variant: str | None
    tensors: dict[str, Mapped]


def open_weights(folder: Path, stem: str, variant: str | None, single_first: bool) -> WeightFiles:
    """Map the files of weights `stem` in a folder; where it lacks the variant, the plain ones.

    single_first: which counts when a single file and an index lie side by side: the single file (transformers) or the
    index (diffusers). Raises WeightsError naming every file that is missing or broken and every contradiction.
    """
    for wanted in dict.fromkeys((variant, None)):
        indexes = [folder / name for name in _index_names(stem, wanted)]
        single = [folder / _file_name(stem, wanted)]
        for path in [*single, *indexes] if single_first else [*indexes, *single]:
            if _exists(path):
                if path in indexes:
                    return WeightFiles(wanted, open_indexed(path))
                mapped = files.open_mapped(path)
                return WeightFiles(wanted, dict.fromkeys(mapped.header.tensors, mapped))
    raise WeightsError(f"{folder / _file_name(stem, variant)}: is missing{_instead(folder, stem)}")


def open_indexed(index: Path) -> dict[str, Mapped]:
    """Map every file that an index names. Raises WeightsError as `open_weights` does."""
    places = files.read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise WeightsError(f"{index}: is no index of weights: weight_map must say in which file each tensor is")
    if len(places) > MAX_TENSORS:
        raise WeightsError(f"{index}: {too_many(len(places))}")
    wrong = {key: name for key, name in places.items() if not _plain(name)}
    if wrong:
        raise WeightsError([f"{index}: {key} is in {name!r}, which is no file name" for key, name in wrong.items()])
    problems: list[str] = []
    names = dict.fromkeys(places.values())
    shards: dict[str, Mapped] = {}
    for name in names:
        shard = attempt(problems, files.open_mapped, index.parent / name)
        if shard is not None:
            shards[name] = shard
            problems += _contradictions(index, name, shard, places)
    if problems:
        raise WeightsError(problems)
    return {key: shards[name] for key, name in places.items()}


def write_weights(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    shard_bytes: int | None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """One file, or shards of at most `shard_bytes` (each at least one tensor) and their index."""
    metadata = metadata or {"format": "pt"}
    shards = _split(tensors, dtype, shard_bytes)
    if len(shards) == 1:
        files.write(folder / _file_name(stem, None), tensors, metadata=metadata, dtype=dtype)
        return
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        files.write(folder / name, {key: tensors[key] for key in shard}, metadata=metadata, dtype=dtype)
    where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": size_of(tensors.values(), dtype)}, "weight_map": where}
    path = folder / _index_names(stem, None)[0]
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _file_name(stem: str, variant: str | None) -> str:
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def _index_names(stem: str, variant: str | None) -> list[str]:
    if not variant:
        return [f"{stem}.safetensors.index.json"]
    return [f"{stem}.safetensors.index.{variant}.json", f"{stem}.{variant}.safetensors.index.json"]


def _contradictions(index: Path, name: str, shard: Mapped, places: Mapping[str, str]) -> Iterable[str]:
    claimed = {key for key, place in places.items() if place == name}
    for key in sorted(claimed - set(shard.header.tensors)):
        yield f"{shard.path}: lacks {key}, which {index.name} says is in it"
    for key in sorted(set(shard.header.tensors) - claimed):
        claim = "says is elsewhere" if key in places else "does not name"
        yield f"{shard.path}: holds {key}, which {index.name} {claim}"


def _plain(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise WeightsError(f"{path}: cannot be opened: {reason(error)}") from error
    return True


def _instead(folder: Path, stem: str) -> str:
    try:
        names = sorted(path.name for path in folder.iterdir() if path.name.startswith(stem) or path.suffix in _PICKLES)
    except OSError as error:
        return f" ({reason(error)})"
    pickles = [name for name in names if name.endswith(_PICKLES)]
    middles = {name.split(".")[1].split("-")[0] for name in names if name.endswith(".safetensors")}
    variants = sorted(middles - {"safetensors"})
    if variants:
        options = " or ".join(map(repr, variants))
        return f"; there are variants, ask for variant={options} (--variant {variants[0]})"
    if pickles:
        return f"; {pickles[0]} is a pickle, which is never opened: save it as safetensors where you trust it"
    return ""


def _split(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, shard_bytes: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, value in tensors.items():
        size = _size(value, dtype)
        if shard_bytes is not None and shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def size_of(values: Iterable[Tensor], dtype: torch.dtype | None) -> int:
    """Bytes of the tensors, once those that are floating are of `dtype`."""
    return sum(_size(value, dtype) for value in values)


def _size(value: Tensor, dtype: torch.dtype | None) -> int:
    return value.numel() * (dtype if dtype and value.is_floating_point() else value.dtype).itemsize
