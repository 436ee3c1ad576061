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
from torch import Tensor

from functional_sd3.core.spec import Param
from functional_sd3.core.types import Params
from functional_sd3.formats import bounded, files, json_fields, shards
from functional_sd3.formats.errors import WeightsError, attempt, reason
from functional_sd3.formats.json_fields import Object
from functional_sd3.formats.shards import WeightFiles
from functional_sd3.image import clip_pixels
from functional_sd3.layouts import config_fields, diffusers_keys, rules
from functional_sd3.layouts import diffusers_configs as configs
from functional_sd3.layouts.rules import Layout, Rule, Source, renamed
from functional_sd3.text import bpe, clip
from functional_sd3.text.clip import dual as clip_dual
from functional_sd3.text.clip import image as clip_image
from functional_sd3.weights import default_dtype
from functional_sd3.weights.default_dtype import Dtype

_HEAD_WIDTH = 64
"""Channels of a head in every CLIP released by OpenAI: gives the number of heads if only shapes are known."""
_TEXT, _IMAGE = "text_model.", "vision_model."


class Clip(NamedTuple):
    """A CLIP model; `tokenizer` are the tables of `bpe`, None where the folder has none."""

    params: Params
    config: clip_dual.Config
    tokenizer: Any
    pixels: clip_pixels.Config


def _within(ours: str, rules: tuple[Rule, ...], start: str) -> tuple[Rule, ...]:
    """Rules of the text encoder alone as rules below `ours`, whose tensors start with `start` instead."""
    return tuple(
        rule._replace(ours=ours + rule.ours, theirs=tuple(name.replace(_TEXT, start, 1) for name in rule.theirs))
        for rule in rules
    )


_TEXT_RULES = diffusers_keys.CLIP.rules
LAYOUT = Layout(
    rules=(
        *_within("text.", _TEXT_RULES, _TEXT),
        *renamed(
            ("logit_scale", "logit_scale"),
            ("image.class_embedding", "vision_model.embeddings.class_embedding"),
            ("image.patch.weight", "vision_model.embeddings.patch_embedding.weight"),
            ("image.position_embedding.{leaf}", "vision_model.embeddings.position_embedding.{leaf}"),
            ("image.first_norm.{leaf}", "vision_model.pre_layrnorm.{leaf}"),
            ("image.final_norm.{leaf}", "vision_model.post_layernorm.{leaf}"),
            ("image.projection.{leaf}", "visual_projection.{leaf}"),
        ),
        *_within("image.", tuple(rule for rule in _TEXT_RULES if rule.ours.startswith("blocks.")), _IMAGE),
    ),
    # Counted positions, which older transformers saved.
    ignored=("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
)


def load(path: str | os.PathLike, *, dtype: Dtype = None, device: torch.device | str = "cpu") -> Clip:
    """The model in a folder of transformers' `CLIPModel`, or in one safetensors file with its tensors.

    Beside a file its config.json and so on are read if they are there; otherwise the sizes are read off the shapes,
    with heads of 64 and quick GELU, as in all of OpenAI's. dtype: as of `weights.load`.
    Raises WeightsError with every problem: missing or broken files, missing, unexpected or misshapen tensors, configs
    that we do not compute. Nothing loads in part.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path}: does not exist")
    single = path.is_file()
    folder = path.parent if single else path
    problems: list[str] = []
    weights = attempt(problems, _open, path, single)
    names = rules.canonical(LAYOUT, weights.tensors) if weights else {}
    shapes = {name: shards.entry(weights, found).shape for name, found in names.items()} if weights else {}
    described = not single or os.path.lexists(folder / "config.json")
    config = attempt(problems, _read_config, folder) if described else attempt(problems, _guess, path, shapes)
    if weights and config:
        problems += [f"{path}: {problem}" for problem in _problems(config, weights, names, shapes)]
    pixels = attempt(problems, _read_pixels, folder, config) if config else None
    tokenizer = attempt(problems, _read_tokenizer, folder)
    if problems or weights is None or config is None or pixels is None:
        raise WeightsError(problems)
    return Clip(_read(config, weights, names, dtype, device), config, tokenizer, pixels)


def _open(path: Path, single: bool) -> WeightFiles:
    if not single:
        return shards.open_weights(path, "model", None, single_first=True)
    mapped = files.open_mapped(path)
    return WeightFiles(None, dict.fromkeys(mapped.header.tensors, mapped))


def _read_config(folder: Path) -> clip_dual.Config:
    path = folder / "config.json"
    values = files.read_json(path)
    if values.get("model_type") != "clip":
        raise WeightsError(f"{path}: model_type is {values.get('model_type')!r}, only 'clip' is supported")
    problems: list[str] = []
    projection = values.get("projection_dim", 512)
    parts: list[Any] = []
    for name, table in (("text_config", configs.CLIP), ("vision_config", configs.CLIP_IMAGE)):
        # Old files say some things twice; transformers believes the second. The towers' own widths of projection say
        # nothing: both project to the model's.
        said = values.get(f"{name}_dict") or values.get(name) or {}
        if not isinstance(said, Mapping):
            problems.append(f"{path}: {name} must be an object")
            continue
        said = {**said, "projection_dim": projection}
        parts.append(attempt(problems, config_fields.read, table, said, f"{path}: {name}"))
    if problems:
        raise WeightsError(problems)
    text, image = parts
    return clip_dual.Config(text, image)


def _guess(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> clip_dual.Config:
    """The config whose specs have these shapes, as far as shapes tell."""
    try:
        vocab, text_width = shapes["text_model.embeddings.token_embedding.weight"]
        image_width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
        patches = shapes["vision_model.embeddings.position_embedding.weight"][0] - 1
        projection, _ = shapes["text_projection.weight"]
        text = clip.Config(
            vocab=vocab,
            length=shapes["text_model.embeddings.position_embedding.weight"][0],
            projection_width=projection,
            **_tower(shapes, _TEXT, text_width),
        )
        image = clip_image.Config(
            size=patch * round(patches**0.5), patch=patch, projection_width=projection,
            **_tower(shapes, _IMAGE, image_width),
        )  # fmt: skip
    except KeyError as error:
        raise WeightsError(f"{path}: lacks {error.args[0]}, so it is no CLIP model of transformers' layout") from None
    except ValueError as error:
        raise WeightsError(f"{path}: its shapes are not those of a CLIP model: {error}") from None
    return clip_dual.Config(text, image)


def _tower(shapes: Mapping[str, tuple[int, ...]], start: str, width: int) -> dict[str, Any]:
    layer = f"{start}encoder.layers."
    depth = len({name[len(layer) :].split(".")[0] for name in shapes if name.startswith(layer)})
    mlp_width = shapes[f"{layer}0.mlp.fc1.weight"][0]
    return {"width": width, "layers": depth, "heads": max(width // _HEAD_WIDTH, 1), "mlp_width": mlp_width}


def _problems(config: clip_dual.Config, weights: WeightFiles, names: Mapping[str, str], shapes: Mapping) -> list[str]:
    try:
        problems = rules.check(LAYOUT, clip_dual.spec(config), shapes)
    except (RuntimeError, OverflowError) as error:
        return [f"its config describes tensors too large to exist: {error}"]
    for name in names.values():
        if not shards.entry(weights, name).dtype.is_floating_point:
            problems.append(f"{name} has dtype {shards.entry(weights, name).dtype}, not a float")
    return problems


def _read(
    config: clip_dual.Config,
    weights: WeightFiles,
    names: Mapping[str, str],
    dtype: Dtype,
    device: torch.device | str,
) -> Params:
    stored = {shards.entry(weights, name).dtype for name in names.values()}
    chosen = default_dtype.choose(dtype, stored, device)
    if dtype is None and chosen:
        default_dtype.say(stored - {chosen}, {chosen}, device)

    def fetch(source: Source, param: Param) -> Tensor:
        found = [names[name] for name in source.names]
        together = shards.stacked(weights, found) if source.transform is rules.FUSE else None
        if together is None:
            together = source.transform.join([shards.tensor(weights, name) for name in found])
        return together.to(device=device, dtype=chosen).contiguous()

    return rules.to_ours(LAYOUT, clip_dual.spec(config), fetch)


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
        found = {side: sides.integer(side, low=1, high=_LARGEST_SIDE) for side in sides.values}
        if edge not in found or len(set(found.values())) > 1:
            raise values.error(name, f"must be a whole number or {{{edge!r}: one}}")
        return found[edge]
    return values.integer(name, default, low=1, high=_LARGEST_SIDE)


def _three(values: Object, name: str) -> tuple[float, float, float]:
    default = getattr(clip_pixels.Config(), name.removeprefix("image_"))
    found = values.items(name, default, float)
    # Whole numbers of hundreds of digits are no floats.
    if len(found) != 3 or not all(-_LARGEST_PIXEL <= each <= _LARGEST_PIXEL for each in found):
        raise values.error(name, "must be three numbers between -1000 and 1000")
    first, second, third = map(float, found)
    return first, second, third


_CONFIG_LIMIT = bounded.MEBIBYTE
_BICUBIC = 3
_LARGEST_SIDE = 2**14
_LARGEST_PIXEL = 1000.0


def _read_tokenizer(folder: Path) -> Any:
    if not any(os.path.lexists(folder / name) for name in ("tokenizer.json", "vocab.json", "merges.txt")):
        return None
    try:
        return bpe.init(folder)
    except OSError as error:
        raise WeightsError(f"{folder}: its tokenizer cannot be read: {reason(error)}") from error
