"""Textual inversions on disk: a safetensors file with the vectors of one word, `clip_l`, `clip_g` and `t5xxl`.

Usage:

    word = weights.load_inversion("cat-toy.safetensors")        # typed as <cat-toy>
    params, config, tokenizers = textual_inversion.add(model.params, model.config, model.tokenizers, word)
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from functional_sd3.formats import files, folder_kinds
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.printable import shorten
from functional_sd3.text.textual_inversion import Word

_NAMES = {"clip_l": "clip_l", "clip_g": "clip_g", "t5xxl": "t5", "t5": "t5"}
_THEIRS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"}
_WIDTHS = {768: "clip_l", 1280: "clip_g", 4096: "t5"}
"""Width -> encoder, of the released ones: decides for vectors without an encoder's name."""
_TOKEN = "token"
"""Key of the metadata for what to type."""
_MAX_VECTORS = 512
"""Tokens of the longest text that T5 reads here; CLIP has room for 75."""
_PLACEHOLDERS = frozenset({"emb_params", "string_to_param.*", "*"})
"""AUTOMATIC1111's names of the vectors of any word, the last two of its .pt files; diffusers writes the word itself."""


def load(path: str | os.PathLike, *, token: str | None = None, dtype: torch.dtype | None = None) -> Word:
    """The word in a file, or in the folder of a training run. token: what to type for it; by default that of the file's
    metadata, or else the file's name in angle brackets.

    Files name the encoders (`clip_l`, `clip_g`, `t5xxl`: OneTrainer, kohya-ss, ComfyUI), or have the vectors of one
    encoder of their width, under `emb_params` or `string_to_param.*` (AUTOMATIC1111) or under the word
    itself (diffusers), which is then what to type by default. Raises WeightsError when the file cannot be read, holds
    other names, output embeddings, or no floats of shape (vectors, width).
    """
    path = _find(Path(path))
    mapped = files.open_mapped(path)
    entries = mapped.header.tensors
    encoders = _encoders(entries)
    problems = [f"{path}: {problem}" for problem in _problems(entries, encoders)]
    if problems:
        raise WeightsError(problems)
    vectors = {ours: files.tensor(mapped, name) for name, ours in encoders.items()}
    if not all(torch.isfinite(value.float()).all() for value in vectors.values()):
        raise WeightsError(f"{path}: holds values that are not finite")
    together = {name: torch.atleast_2d(value).to(dtype or value.dtype) for name, value in vectors.items()}
    own = [name for name in encoders if name not in _NAMES and name not in _PLACEHOLDERS]
    written = mapped.header.metadata.get(_TOKEN) or (own[0] if own else f"<{path.stem}>")
    typed = written if token is None else token
    if not typed.isprintable() or typed != typed.strip():
        advice = "cannot be typed in a prompt; say what to type: token=..., or WORD=FILE"
        raise WeightsError(f"{path}: its word {typed!r} {advice}")
    return Word(typed, {name: together[name] for name in _THEIRS if name in together})


def _find(path: Path) -> Path:
    if not path.is_dir() or (path / folder_kinds.WORD).is_file():
        return path / folder_kinds.WORD if path.is_dir() else path
    raise WeightsError(f"{path}: is a folder without {folder_kinds.WORD}{folder_kinds.described(path)}")


def _encoders(entries: Mapping[str, Any]) -> dict[str, str]:
    """Name in the file -> our name of the encoder, for the known ones."""
    if len(entries) == 1:
        ((name, entry),) = entries.items()
        if name not in _NAMES and not name.endswith(_OUTPUT) and 1 <= len(entry.shape) <= 2:
            return {name: _WIDTHS[entry.shape[-1]]} if entry.shape[-1] in _WIDTHS else {}
    return {name: ours for name, ours in _NAMES.items() if name in entries}


_OUTPUT = tuple(f"{name}_out" for name in _NAMES)


def _problems(entries: Mapping[str, Any], encoders: Mapping[str, str]) -> list[str]:
    known = ", ".join(_THEIRS.values())
    outputs = sorted(name for name in entries if name.endswith(_OUTPUT))
    if outputs:
        return [
            f"{', '.join(map(shorten, outputs[:3]))}: output embeddings of OneTrainer, which take the place of what a "
            f"text encoder returns for the word and not of what it reads; only input embeddings can be used ({known}): "
            "train it with 'output embedding' off"
        ]
    unknown = [name for name in entries if name not in encoders]
    if len(entries) == 1 and unknown and 1 <= len(entries[unknown[0]].shape) <= 2:
        width = entries[unknown[0]].shape[-1]
        of = "; vectors of width 1024 are of Stable Diffusion 2" if width == 1024 else ""
        widths = ", ".join(f"{theirs} {width}" for width, theirs in zip(_WIDTHS, _THEIRS.values(), strict=True))
        return [f"{shorten(unknown[0])} names no encoder and is {width} wide, as none of SD3's is ({widths}){of}"]
    problems = [f"{shorten(name)} is no encoder; a textual inversion of SD3 holds {known}" for name in unknown]
    problems += [
        f"{shorten(name)} is {entry.dtype} of shape {list(entry.shape)}, must be floats (vectors, width)"
        for name, entry in entries.items()
        if not entry.dtype.is_floating_point or not 1 <= len(entry.shape) <= 2 or 0 in entry.shape
    ]
    problems += [
        f"{shorten(name)} has {entry.shape[0]:,} vectors; a text has room for {_MAX_VECTORS} at most"
        for name, entry in entries.items()
        if len(entry.shape) == 2 and entry.shape[0] > _MAX_VECTORS
    ]
    if not entries:
        problems.append(f"holds no vectors; a textual inversion of SD3 holds {known}")
    if "t5" in entries and "t5xxl" in entries:
        problems.append("holds both t5 and t5xxl, which are the same encoder")
    return problems


def save(path: str | os.PathLike, word: Word) -> None:
    """Write the file, whole or not at all."""
    tensors = {_THEIRS[name]: value for name, value in word.vectors.items()}
    files.write_atomic(path, tensors, metadata={"format": "pt", _TOKEN: word.token})
