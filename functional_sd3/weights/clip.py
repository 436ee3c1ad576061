"""CLIP models with both encoders, as transformers' `CLIPModel` writes them: config, weights, tokenizer, preprocessing.

Files:

    config.json  model.safetensors  preprocessor_config.json  tokenizer.json | vocab.json, merges.txt
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from functional_sd3.core.types import Params
from functional_sd3.formats import bounded, files, json_fields, shards, trees
from functional_sd3.formats.default_dtype import Dtype
from functional_sd3.formats.errors import WeightsError, attempt, reason
from functional_sd3.formats.files import Mapped
from functional_sd3.formats.json_fields import Object
from functional_sd3.formats.tensors import open_tensors
from functional_sd3.image import clip_pixels
from functional_sd3.layouts import config_fields
from functional_sd3.layouts import diffusers_configs as configs
from functional_sd3.layouts.clip_dual import FORMAT
from functional_sd3.text import bpe
from functional_sd3.text.clip import dual as clip_dual
from functional_sd3.weights import read
from functional_sd3.weights.read import ComponentFiles


class Clip(NamedTuple):
    """A CLIP model; `tokenizer` are the tables of `bpe`, None where the folder has none."""

    params: Params
    config: clip_dual.Config
    tokenizer: Any
    pixels: clip_pixels.Config


def load(path: str | os.PathLike, *, dtype: Dtype = None, device: torch.device | str = "cpu") -> Clip:
    """The model in a folder of transformers' `CLIPModel`, or in one safetensors file with its tensors.

    Beside a file its config.json and so on are read if they are there; otherwise the sizes are read off the shapes,
    with heads of 64 and quick GELU, as in all of OpenAI's. dtype: as in `weights.load`.
    Raises WeightsError with every problem: missing or broken files, missing, unexpected or misshapen tensors, configs
    that we do not compute. Nothing loads in part.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path}: does not exist")
    single = path.is_file()
    folder = path.parent if single else path
    problems: list[str] = []
    places = attempt(problems, _open, path)
    described = not single or os.path.lexists(folder / "config.json")
    config = attempt(problems, _read_config, folder) if described else None
    planned = None
    if places is not None and (config is not None or not described):
        planned = attempt(problems, read.plan, ComponentFiles("CLIP", FORMAT, str(path), places, config))
        config = planned.config if planned is not None else config
    pixels = attempt(problems, _read_pixels, folder, config) if config else None
    tokenizer = attempt(problems, _read_tokenizer, folder)
    if problems or planned is None or pixels is None:
        raise WeightsError(problems)
    return Clip(trees.load(planned.tree, dtype=dtype, device=device), planned.config, tokenizer, pixels)


def _open(path: Path) -> dict[str, Mapped]:
    if path.is_file():
        return open_tensors(path)
    return shards.open_weights(path, "model", None, single_first=True).tensors


def _read_config(folder: Path) -> clip_dual.Config:
    path = folder / "config.json"
    values = files.read_json(path)
    if values.get("model_type") != "clip":
        raise WeightsError(f"{path}: model_type is {values.get('model_type')!r}, only 'clip' is supported")
    problems: list[str] = []
    projection = values.get("projection_dim", 512)
    parts: list[Any] = []
    for name, table in (("text_config", configs.CLIP), ("vision_config", configs.CLIP_IMAGE)):
        # Old files hold some fields twice; transformers takes the second. The encoders' own widths of projection are
        # ignored: both project to the model's.
        fields = values.get(f"{name}_dict") or values.get(name) or {}
        if not isinstance(fields, Mapping):
            problems.append(f"{path}: {name} must be an object")
            continue
        fields = {**fields, "projection_dim": projection}
        parts.append(attempt(problems, config_fields.read, table, fields, f"{path}: {name}"))
    if problems:
        raise WeightsError(problems)
    text, image = parts
    return clip_dual.Config(text, image)


def _read_pixels(folder: Path, config: clip_dual.Config) -> clip_pixels.Config:
    """The preprocessing that the folder names; without a file OpenAI's, at the size of the image encoder."""
    side = config.image.size
    values = None
    if os.path.lexists(folder / "preprocessor_config.json"):
        values = json_fields.read(folder / "preprocessor_config.json", limit=_CONFIG_LIMIT)
    elif os.path.lexists(folder / "processor_config.json"):
        whole = json_fields.read(folder / "processor_config.json", limit=_CONFIG_LIMIT)
        values = whole.mapping("image_processor", None)
    if values is None:
        return clip_pixels.Config(resize=side, crop=side)
    resize, crop = _side(values, "size", "shortest_edge", side), _side(values, "crop_size", "height", side)
    mean, std = _three(values, "image_mean"), _three(values, "image_std")
    if not min(std) > 0:
        raise values.error("image_std", "must be three numbers above 0")
    if crop != side:
        raise values.error("crop_size", f"must be {side}, which the image encoder reads")
    if not crop <= resize:
        raise values.error("size", f"must be at least crop_size, {crop}")
    for name in ("do_resize", "do_center_crop", "do_normalize", "do_rescale"):
        if not values.boolean(name, True):
            raise values.error(name, "must be true: only that is supported")
    if values.integer("resample", _BICUBIC) != _BICUBIC:
        raise values.error("resample", f"must be {_BICUBIC} (bicubic): only that is supported")
    if not math.isclose(values.number("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise values.error("rescale_factor", "must be 1/255: only that is supported")
    return clip_pixels.Config(resize=resize, crop=crop, mean=mean, std=std)


def _side(values: Object, name: str, edge: str, default: int) -> int:
    """A side in pixels, written as a number or as an object whose values are one number."""
    if isinstance(values.values.get(name), dict):
        sides = values.mapping(name)
        lengths = {side: sides.integer(side, low=1, high=_MAX_SIDE) for side in sides.values}
        if edge not in lengths or len(set(lengths.values())) > 1:
            raise values.error(name, f"must be a whole number or {{{edge!r}: one}}")
        return lengths[edge]
    return values.integer(name, default, low=1, high=_MAX_SIDE)


def _three(values: Object, name: str) -> tuple[float, float, float]:
    default = getattr(clip_pixels.Config(), name.removeprefix("image_"))
    numbers = values.items(name, default, float)
    # A whole number of hundreds of digits overflows a float.
    if len(numbers) != 3 or not all(-_MAX_PIXEL <= each <= _MAX_PIXEL for each in numbers):
        raise values.error(name, "must be three numbers between -1000 and 1000")
    first, second, third = map(float, numbers)
    return first, second, third


_CONFIG_LIMIT = bounded.MEBIBYTE
_BICUBIC = 3
_MAX_SIDE = 2**14
_MAX_PIXEL = 1000.0


def _read_tokenizer(folder: Path) -> Any:
    if not any(os.path.lexists(folder / name) for name in ("tokenizer.json", "vocab.json", "merges.txt")):
        return None
    try:
        return bpe.init(folder)
    except OSError as error:
        raise WeightsError(f"{folder}: its tokenizer cannot be read: {reason(error)}") from error
