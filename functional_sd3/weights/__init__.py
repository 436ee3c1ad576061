"""Trees on disk: models read from and written to the folders people have.

    model = weights.load("stable-diffusion-3.5-medium", dtype=torch.bfloat16)
    weights.save("mine", model._replace(params=...))
"""

import os
from collections.abc import Collection
from pathlib import Path

import torch

from functional_sd3.weights import atomic, diffusers, files, layout
from functional_sd3.weights.clip import load as load_clip
from functional_sd3.weights.errors import WeightsError
from functional_sd3.weights.model import SPECS, Config, Model, Tokenizers, check, spec

__all__ = [
    "Config",
    "Model",
    "Tokenizers",
    "WeightsError",
    "check",
    "files",
    "layout",
    "load",
    "load_clip",
    "save",
    "spec",
]

# Layout -> the module that reads and writes it.
_LAYOUTS = {"diffusers": diffusers}


def load(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    only: str | Collection[str] | None = None,
    variant: str | None = None,
) -> Model:
    """The model in a diffusers folder of SD3 or SD3.5.

    dtype: of every parameter; None keeps each as stored. only: a component or several ("transformer", "vae",
    "clip_l", "clip_g", "t5"), each with its tokenizer; the others are then absent. variant: of the files ("fp16"),
    where a component has one.

    On the CPU, parameters that are stored as they are used are views of the mapped file, copy-on-write: they are read
    when touched, and updating them in place changes neither the file nor another load. Other programs must not rewrite
    the file in place meanwhile; `save` and `files.write_atomic` never do that.

    Raises WeightsError with every problem of the folder (missing or broken files, missing, unexpected or misshapen
    tensors, configs we do not compute), ValueError for a component or dtype that does not exist. Nothing loads in part.
    """
    chosen = _components(only)
    _check_dtype(dtype)
    return atomic.read_stable(
        Path(path),
        lambda folder: diffusers.load(folder, dtype=dtype, device=device, only=chosen, variant=variant),
        diffusers.OWNED,
    )


def save(
    path: str | os.PathLike,
    model: Model,
    *,
    layout: str = "diffusers",
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Write a whole model to the folder `path`, which `load` and diffusers' `StableDiffusion3Pipeline` read.

    dtype: to convert to while writing, None keeps each parameter's. shard_bytes: weights of a component above this
    size are split. Of the model in an existing folder nothing is left, its other entries stay; if the save fails or is
    killed, the folder still loads as it was (`weights.atomic` says how). Raises WeightsError when the parameters do not
    fit the config or the system refuses, ValueError for an unknown layout.
    """
    if layout not in _LAYOUTS:
        raise ValueError(f"layout {layout!r} must be one of {sorted(_LAYOUTS)}")
    if shard_bytes is not None and shard_bytes < 1:
        raise ValueError(f"shard_bytes {shard_bytes} must be at least 1")
    _check_dtype(dtype)
    problems = check(model)
    if problems:
        raise WeightsError(problems)
    module = _LAYOUTS[layout]
    atomic.replace_folder(
        path, lambda folder: module.write(folder, model, dtype=dtype, shard_bytes=shard_bytes), module.OWNED
    )


def _components(only: str | Collection[str] | None) -> Collection[str]:
    chosen = tuple(SPECS) if only is None else (only,) if isinstance(only, str) else tuple(only)
    unknown = [name for name in chosen if name not in SPECS]
    if unknown:
        raise ValueError(f"only={unknown[0]!r} is not a component; known are {', '.join(SPECS)}")
    return chosen


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype {dtype} must be a floating one, such as torch.bfloat16")
