"""Models written as files that hold several components: Stability's and our own names, and the folders of them."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from functional_sd3.formats import files, shards
from functional_sd3.layouts import diffusers_folder, registry
from functional_sd3.layouts.format import Format
from functional_sd3.weights import metadata
from functional_sd3.weights.discover import NATIVE_FOLDER, STABILITY_FILES
from functional_sd3.weights.model import Model, split_scales

_ALONE = {"clip_l": registry.DIFFUSERS["clip_l"], "clip_g": registry.DIFFUSERS["clip_g"], "t5": registry.BARE["t5"]}


def write_file(
    path: Path,
    model: Model,
    table: Mapping[str, Format],
    *,
    dtype: torch.dtype | None,
    shard_bytes: int | None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Every component in one file, each under the names of its format. notes: further entries of its metadata."""
    tensors = _together(model, table, model.params)
    _check_size(str(path), tensors, dtype, shard_bytes)
    entries = {**(notes or {}), **metadata.write(model.config, tuple(model.params))}
    files.write_atomic(path, tensors, metadata=entries, dtype=dtype)


def write_stability(folder: Path, model: Model, *, dtype: torch.dtype | None, shard_bytes: int | None) -> None:
    """Fill an empty folder with Stability's files, one for the transformer and the VAE and one for each encoder."""
    for file, components in STABILITY_FILES.items():
        held = [name for name in components if name in model.params]
        if held:
            tensors = _together(model, {**registry.STABILITY, **_ALONE}, held)
            _check_size(file, tensors, dtype, shard_bytes)
            files.write(folder / file, tensors, metadata=metadata.write(model.config, held), dtype=dtype)
    _write_tokenizers(folder, model)


def write_native(
    folder: Path,
    model: Model,
    *,
    dtype: torch.dtype | None,
    shard_bytes: int | None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Fill an empty folder with the trees under their own names. notes: further entries of the files' metadata."""
    tensors = _together(model, registry.NATIVE, model.params)
    place = folder / NATIVE_FOLDER
    place.mkdir()
    entries = {**(notes or {}), **metadata.write(model.config, tuple(model.params))}
    if tensors:
        shards.write_weights(place, NATIVE_FOLDER, tensors, dtype=dtype, shard_bytes=shard_bytes, metadata=entries)
    _write_tokenizers(folder, model)


def _check_size(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, shard_bytes: int | None) -> None:
    """Raises ValueError where a file that cannot be split would be larger than `shard_bytes`."""
    size = shards.size_of(tensors.values(), dtype)
    if shard_bytes is not None and size > shard_bytes:
        raise ValueError(
            f"{name} would have {size} bytes, above shard_bytes {shard_bytes}, and this layout is not split: "
            'use layout="diffusers", or layout="native" with a folder'
        )


def _write_tokenizers(folder: Path, model: Model) -> None:
    for name, tokenizer in diffusers_folder.TOKENIZERS.items():
        tables = getattr(model.tokenizers, name)
        if tables is not None:
            tokenizer.module.save(folder / tokenizer.folder, tables)


def _together(model: Model, table: Mapping[str, Format], components: Iterable[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in components:
        weights, scales = split_scales(model.params[name])
        tensors.update(table[name].tensors(getattr(model.config, name), weights))
        # ComfyUI's name for the factors of a weight, which `formats.scaled_fp8` knows.
        tensors.update({f"{table[name].prefix}{path}_weight": scale for path, scale in scales.items()})
    return tensors
