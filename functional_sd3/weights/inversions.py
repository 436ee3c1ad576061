"""Textual inversions on disk: a safetensors file with the vectors of one word, `clip_l`, `clip_g` and `t5xxl`.

    word = weights.load_inversion("cat-toy.safetensors")        # typed as <cat-toy>
    params, config, tokenizers = inversion.add(model.params, model.config, model.tokenizers, word)
"""

import os
from pathlib import Path

import torch

from functional_sd3.formats.errors import WeightsError
from functional_sd3.text.inversion import Word
from functional_sd3.weights import files

_NAMES = {"clip_l": "clip_l", "clip_g": "clip_g", "t5xxl": "t5", "t5": "t5"}
_THEIRS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"}


def load(path: str | os.PathLike, *, token: str | None = None, dtype: torch.dtype | None = None) -> Word:
    """The word in a file. token: what to type for it; by default the file's name in angle brackets.

    Raises WeightsError when the file cannot be read, holds other names, or no floats of shape (vectors, width).
    """
    path = Path(path)
    mapped = files.open_mapped(path)
    entries = mapped.header.tensors
    known = ", ".join(_THEIRS.values())
    strangers = [name for name in entries if name not in _NAMES]
    problems = [f"{name} is no encoder; a textual inversion of SD3 holds {known}" for name in strangers]
    problems += [
        f"{name} is {entry.dtype} of shape {list(entry.shape)}, must be floats (vectors, width)"
        for name, entry in entries.items()
        if not entry.dtype.is_floating_point or not 1 <= len(entry.shape) <= 2 or 0 in entry.shape
    ]
    if not entries:
        problems.append(f"holds no vectors; a textual inversion of SD3 holds {known}")
    if "t5" in entries and "t5xxl" in entries:
        problems.append("holds both t5 and t5xxl, which are the same encoder")
    if problems:
        raise WeightsError([f"{path}: {problem}" for problem in problems])
    vectors = {ours: files.tensor(mapped, name) for name, ours in _NAMES.items() if name in entries}
    if not all(torch.isfinite(value.float()).all() for value in vectors.values()):
        raise WeightsError(f"{path}: holds values that are not finite")
    together = {name: torch.atleast_2d(value).to(dtype or value.dtype) for name, value in vectors.items()}
    return Word(f"<{path.stem}>" if token is None else token, together)


def save(path: str | os.PathLike, word: Word) -> None:
    """Write the file, whole or not at all."""
    tensors = {_THEIRS[name]: value for name, value in word.vectors.items()}
    files.write_atomic(path, tensors, metadata={"format": "pt"})
