"""Folders within a `models/` folder: which of them may hold components of a model, found within bounds."""

import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from functional_sd3.formats.errors import WeightsError, reason
from functional_sd3.layouts import diffusers_folder

MODEL_FOLDERS = (
    "checkpoints", "diffusion_models", "unet", "text_encoders", "clip", "vae", "Stable-diffusion", "VAE",
    "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "diffusers", "tokenizers", "snapshots",
)  # fmt: skip
"""Folders of a `models/` folder (ComfyUI's, AUTOMATIC1111's), of a diffusers folder without its model_index.json or of
Hugging Face's cache that hold parts of a model; others (loras, controlnet, embeddings) hold additions to one."""
_COMPANIONS = frozenset({
    "loras", "lora", "controlnet", "controlnets", "embeddings", "ipadapter", "clip_vision", "upscale_models",
    "hypernetworks", "gligen", "style_models", "vae_approx", "photomaker", "audio_encoders", "model_patches",
})  # fmt: skip
"""Folders of additions to a model and of other models: never entered."""
WEIGHTS = (".safetensors", ".sft", ".gguf")
TOKENIZER = frozenset({"vocab.json", "spiece.model", "tokenizer.json"})
DEPTH = 3
MAX_FOLDERS = 500
MAX_FILES = 1000


class Folder(NamedTuple):
    """A folder and the names of what lies in it."""

    path: Path
    names: frozenset[str]


def folders(inner: Iterable[Path], passed: list[str]) -> list[Folder]:
    """These folders and those in them that hold a model, weights or a tokenizer, `DEPTH` levels of them, each once.

    Below a model, a component or a tokenizer nothing is looked for, nor in hidden folders. passed: what cannot be
    opened joins it. Raises WeightsError for more folders or files than a person would have of models.
    """
    holders: list[Folder] = []
    seen: set[tuple[int, int]] = set()
    files = 0
    level = list(inner)
    with suppress(OSError):
        seen.update(_identity(path.parent) for path in level)
    for depth in range(DEPTH):
        below: list[Path] = []
        for path in level:
            try:
                if not path.is_dir() or (identity := _identity(path)) in seen:
                    continue
                names = frozenset(entry.name for entry in os.scandir(path))
            except OSError as error:
                passed.append(f"{path} ({reason(error)})")
                continue
            seen.add(identity)
            files += sum(map(is_weights, names))
            if len(seen) > MAX_FOLDERS or files > MAX_FILES:
                raise WeightsError(
                    f"{path}: is one of more than {MAX_FOLDERS} folders, or holds one of more than {MAX_FILES} files "
                    "of weights: give the files or folders of one model by their own paths"
                )
            if is_model(names) or any(map(is_weights, names)):
                holders.append(Folder(path, names))
            if not is_model(names) and depth + 1 < DEPTH:
                below += [path / name for name in sorted(names - _COMPANIONS) if not name.startswith(".")]
        level = below
    return holders


def is_model(names: Collection[str]) -> bool:
    """True if a folder of these names is a model, one component or a tokenizer as a whole."""
    return bool({diffusers_folder.INDEX, "config.json", *TOKENIZER} & set(names))


def is_weights(name: str) -> bool:
    """True if a file of this name may hold weights, or is the index of such files."""
    return name.lower().endswith((*WEIGHTS, ".safetensors.index.json"))


def _identity(path: Path) -> tuple[int, int]:
    """Identity of a folder, the same through every link to it."""
    status = path.stat()
    return status.st_dev, status.st_ino
