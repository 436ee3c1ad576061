"""Trees on disk: models read from every format of SD3's weights, and written to those that other programs read.

Usage:

    model = weights.load("stable-diffusion-3.5-medium", dtype=torch.bfloat16)
    model = weights.load(["sd3.5_medium.safetensors", "clip_l.safetensors", "clip_g.safetensors", "tokenizers"])
    weights.save("mine", model._replace(params=...))
    weights.save("mine", params, config)
    weights.save("mine.safetensors", model, layout="single", dtype=torch.float16)
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch

from functional_sd3.core.types import Params
from functional_sd3.formats import atomic, default_dtype, files
from functional_sd3.formats.default_dtype import Dtype
from functional_sd3.formats.errors import WeightsError
from functional_sd3.layouts import diffusers_folder, registry
from functional_sd3.layouts import rules as layout
from functional_sd3.layouts.registry import infer_config
from functional_sd3.weights import (
    assemble,
    base_folder,
    checkpoint_file,
    diffusers,
    discover,
    merge,
    prepack,
    quantize,
    shipped,
)
from functional_sd3.weights.clip import load as load_clip
from functional_sd3.weights.controlnets import load as load_controlnet
from functional_sd3.weights.controlnets import save as save_controlnet
from functional_sd3.weights.describing import describe
from functional_sd3.weights.inversions import load as load_inversion
from functional_sd3.weights.inversions import save as save_inversion
from functional_sd3.weights.ip_adapters import load as load_ip_adapter
from functional_sd3.weights.ip_adapters import save as save_ip_adapter
from functional_sd3.weights.model import SPECS, Config, Model, Tokenizers, check, missing, spec

__all__ = [
    "LAYOUTS",
    "Config",
    "Model",
    "Tokenizers",
    "WeightsError",
    "check",
    "describe",
    "fetcher",
    "files",
    "infer_config",
    "layout",
    "load",
    "load_clip",
    "load_controlnet",
    "load_inversion",
    "load_ip_adapter",
    "merge",
    "missing",
    "outline",
    "prepack",
    "quantize",
    "save",
    "save_controlnet",
    "save_inversion",
    "save_ip_adapter",
    "shipped",
    "spec",
]

LAYOUTS = ("diffusers", "stability", "single", "native")
"""Layouts that `save` writes."""
_FOLDERS: dict[str, Callable[..., None]] = {
    "diffusers": diffusers.write,
    "stability": checkpoint_file.write_stability,
    "native": checkpoint_file.write_native,
}
_OTHER_SUFFIXES = (".bin", ".ckpt", ".gguf", ".onnx", ".pt", ".pth")
_FILES = {"stability": registry.STABILITY, "single": registry.STABILITY, "native": registry.NATIVE}


def load(
    path: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    dtype: Dtype = None,
    device: torch.device | str = "cpu",
    only: str | Collection[str] | None = None,
    variant: str | None = None,
    finite: bool = True,
    quantized: bool = False,
) -> Model:
    """The model at a path, or the one that several paths make up; docs/weights.md lists what may lie there.

    Files are identified by content, never by name: a diffusers folder, a folder of one of its components, a file of
    Stability's or ComfyUI's with one component or several, a folder of such files, tokenizers. The architecture is in
    the configs beside the weights or read off their shapes (`infer_config`). Components that are in none of the paths
    are absent from the model; `missing` names them, and the files that hold them.

    dtype: of every parameter. None is a default that the device computes well, one for each component: what is stored
    all in float32 or bfloat16 stays so, and float16 elsewhere than on a CPU; the rest (float16 on a CPU, float8, blocks
    of GGUF, several dtypes) becomes float32 on a CPU, bfloat16 elsewhere, with a Note. "stored" keeps each
    parameter's own, of scaled fp8 and of blocks float32. only: a component or several
    ("transformer", "vae", "clip_l", "clip_g", "t5", "taesd"), each with its tokenizer; the others are then absent.
    variant: of the files ("fp16"), where a component has one. finite: whether NaN and infinities are refused, which
    reads every value once; False reads none before it is used. quantized: weights stored in int8 or float8 with scales
    stay so, as `weights.quantize` makes them, and layers dequantise them; else they become floats.

    On the CPU, parameters that are stored as they are used are views of the mapped file, copy-on-write: they are read
    when touched, and updating them in place changes neither the file nor another load. Other programs must not rewrite
    the file in place meanwhile; `save` and `files.write_atomic` never do that.

    Raises WeightsError with every problem of the paths (missing or broken files, missing, unexpected or misshapen
    tensors, configs we do not compute, a component that is there twice, pickles), ValueError for a component or dtype
    that does not exist. Nothing loads in part.
    """
    chosen = _components(only)
    default_dtype.check(dtype)
    return assemble.load(
        _paths(path),
        dtype=dtype,
        device=device,
        only=chosen,
        variant=variant,
        finite=finite,
        quantized=quantized,
    )


def outline(
    path: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    only: str | Collection[str] | None = None,
    variant: str | None = None,
) -> Model:
    """The configs and tokenizers that `load` would return; no parameter is read.

    Raises what `load` raises, but for values that are not finite.
    """
    return assemble.outline(_paths(path), only=_components(only), variant=variant)


def fetcher(path: str | os.PathLike | Sequence[str | os.PathLike], **options: Any) -> Callable[[str], Params]:
    """A function from the name of a component to its parameters, read anew whenever it is called; options of `load`.

    `pipeline.encode_from` and `pipeline.generate_from` take components from it, one after another.
    """
    return lambda name: load(path, only=name, **options).params[name]


@overload
def save(
    path: str | os.PathLike,
    model: Model,
    *,
    layout: str = "diffusers",
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    base: str | None = None,
    notes: Mapping[str, str] | None = None,
) -> None: ...
@overload
def save(
    path: str | os.PathLike,
    model: dict[str, Params],
    config: Config,
    *,
    layout: str = "diffusers",
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    base: str | None = None,
    notes: Mapping[str, str] | None = None,
) -> None: ...


def save(
    path: str | os.PathLike,
    model: Model | dict[str, Params],
    config: Config | None = None,
    *,
    layout: str = "diffusers",
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    base: str | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write a model where `load` reads it again, and others read it too.

    model: as `load` returns it; or the parameters of components, with their config after them, and then no tokenizers.
    layout: "diffusers", a folder that `StableDiffusion3Pipeline` loads; "stability", Stability's names, as one file
    where `path` ends in .safetensors, else as a folder with a file for transformer and VAE and one for each encoder;
    "single", one file of everything under Stability's names; "native", our own names, in which nothing is copied on
    loading, as a file or a folder in the same way. Files hold no tokenizers; folders do.

    dtype: to convert to while writing, None keeps each parameter's. shard_bytes: weights above this size are split, in
    the layouts that others read split ("diffusers", a folder of "native"); the rest raise ValueError above it. base:
    folder, relative to `path`, of a model that has what this one lacks, which `load` reads there; "diffusers" alone.
    notes: further entries of the files' metadata, which `inspect` prints; "native" alone.

    Of the model in an existing folder nothing is left, its other entries stay; if the save fails or is killed, what was
    there still loads as it was (see `formats.atomic`). Raises WeightsError when the parameters do not fit the
    config or the system refuses, ValueError for an unknown layout.
    """
    model = _given(model, config)
    if base is not None:
        _check_base(Path(path), base, layout)
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} must be one of {sorted(LAYOUTS)}")
    if notes and layout != "native":
        raise ValueError(f"notes are written with layout 'native' alone, not {layout!r}")
    if shard_bytes is not None and shard_bytes < 1:
        raise ValueError(f"shard_bytes {shard_bytes} must be at least 1")
    _check_dtype(dtype)
    _check_suffix(Path(path), layout)
    problems = check(model)
    if problems:
        raise WeightsError(problems)
    if quantize.is_quantized(model.params) and (layout != "native" or dtype is not None):
        raise ValueError('quantised weights are saved with layout="native" and as they are; dequantize them for others')
    path = Path(path)
    if layout in _FILES and (layout not in _FOLDERS or path.suffix == ".safetensors"):
        checkpoint_file.write_file(path, model, _FILES[layout], dtype=dtype, shard_bytes=shard_bytes, notes=notes)
        return
    options = {"base": base} if base is not None else {"notes": notes} if notes else {}
    write = partial(_FOLDERS[layout], **options)
    atomic.replace_folder(
        path, lambda folder: write(folder, model, dtype=dtype, shard_bytes=shard_bytes), discover.OWNED[layout]
    )


def _given(model: Model | dict[str, Params] | Config, config: Config | dict[str, Params] | None) -> Model:
    if isinstance(model, Model) and config is None:
        if isinstance(model.params, Config):
            raise TypeError("a weights.Model is (params, config, tokenizers), and these are in another order")
        return model
    # (config, params), the order of former versions, is read too: the types tell them apart.
    parts = (model, config) if isinstance(model, dict) else (config, model)
    if isinstance(parts[0], dict) and isinstance(parts[1], Config):
        return Model(*parts)
    given = type(model).__name__ + ("" if config is None else f" and {type(config).__name__}")
    raise TypeError(f"save takes a weights.Model, or the parameters by component and a weights.Config, not {given}")


def _check_suffix(path: Path, layout: str) -> None:
    """Raises ValueError for a name under which readers, ours too, expect another format."""
    suffix = path.suffix.lower()
    if suffix in _OTHER_SUFFIXES:
        raise ValueError(f"{path}: {suffix} is the name of another format; files are written as .safetensors")
    if suffix == ".safetensors" and layout not in _FILES:
        known = " or ".join(repr(name) for name in _FILES)
        raise ValueError(f"{path}: layout {layout!r} is a folder; one file has layout {known} (--layout)")


def _check_base(path: Path, base: str, layout: str) -> None:
    """Raises ValueError for a reference that `load` would not follow, WeightsError for one to no model's folder."""
    if layout != "diffusers":
        raise ValueError(f"base {base!r}: only layout 'diffusers' can refer to another folder, not {layout!r}")
    if problem := base_folder.invalid(base):
        raise ValueError(f"base {problem}")
    place = base_folder.place_of(path, base)
    if not (place / diffusers_folder.INDEX).is_file():
        raise WeightsError(f"base {base!r} of {path}: {place} is no model's folder")


def _paths(path: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if not paths or "" in paths:
        raise ValueError("there is no path to load from" + (": one is empty, and . is this folder" if paths else ""))
    return [Path(one) for one in paths]


def _components(only: str | Collection[str] | None) -> Collection[str]:
    chosen = tuple(SPECS) if only is None else (only,) if isinstance(only, str) else tuple(only)
    unknown = [name for name in chosen if name not in SPECS]
    if unknown:
        raise ValueError(f"only={unknown[0]!r} is not a component; known are {', '.join(SPECS)}")
    return chosen


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype {dtype} must be a floating one, such as torch.bfloat16")
