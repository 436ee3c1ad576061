"""The folder of SD3 and SD3.5 as diffusers writes it: `model_index.json` and a folder for each component.

    model_index.json  scheduler/  text_encoder{,_2,_3}/  tokenizer{,_2,_3}/  transformer/  vae/

Loading maps the files: a tensor that is stored as we use it costs no memory until it is read, one that is fused or
converted is copied once and its pages are given back, so the peak is the weights, once.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import prng, tree
from functional_sd3.core.spec import Param
from functional_sd3.core.types import Params, Tree
from functional_sd3.text import bpe, unigram
from functional_sd3.weights import diffusers_configs as configs
from functional_sd3.weights import diffusers_keys as layouts
from functional_sd3.weights import files, layout, shards
from functional_sd3.weights.errors import WeightsError, attempt, reason
from functional_sd3.weights.layout import Layout, Source
from functional_sd3.weights.model import SPECS, Config, Model, Tokenizers
from functional_sd3.weights.shards import WeightFiles

# The first release whose transformer has everything of SD3.5 (dual attention, qk norm).
_FORMAT = "0.31.0"
_INDEX = "model_index.json"
_PIPELINE = "StableDiffusion3Pipeline"


class Component(NamedTuple):
    """Where a component lies in the folder and how it is read; `stem` names its files of weights."""

    folder: str
    library: str
    owner: str
    table: configs.Table
    layout: Layout
    stem: str
    optional: bool


class Tokenizer(NamedTuple):
    """Where a tokenizer lies, and the module that reads it."""

    folder: str
    owners: tuple[str, ...]
    module: Any


_CLIP = ("transformers", "CLIPTextModelWithProjection", configs.CLIP, layouts.CLIP, "model", True)
COMPONENTS = {
    "clip_l": Component("text_encoder", *_CLIP),
    "clip_g": Component("text_encoder_2", *_CLIP),
    "t5": Component("text_encoder_3", "transformers", "T5EncoderModel", configs.T5, layouts.T5, "model", True),
    "transformer": Component(
        "transformer",
        "diffusers",
        "SD3Transformer2DModel",
        configs.TRANSFORMER,
        layouts.TRANSFORMER,
        "diffusion_pytorch_model",
        False,
    ),
    "vae": Component(
        "vae", "diffusers", "AutoencoderKL", configs.VAE, layouts.VAE, "diffusion_pytorch_model", False
    ),
}
_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_T5_TOKENIZERS = ("T5TokenizerFast", "T5Tokenizer")
TOKENIZERS = {
    "clip_l": Tokenizer("tokenizer", _CLIP_TOKENIZERS, bpe),
    "clip_g": Tokenizer("tokenizer_2", _CLIP_TOKENIZERS, bpe),
    "t5": Tokenizer("tokenizer_3", _T5_TOKENIZERS, unigram),
}
_SCHEDULER = ("scheduler", "FlowMatchEulerDiscreteScheduler")
OWNED = (_INDEX, _SCHEDULER[0], *(part.folder for part in (*COMPONENTS.values(), *TOKENIZERS.values())))
"""The entries of a folder that belong to the model; `save` leaves all others where they are."""


class _Plan(NamedTuple):
    """A component whose files were checked and mapped, and not yet read."""

    config: Any
    spec: Tree
    layout: Layout
    weights: WeightFiles
    names: dict[str, str]


def load(
    folder: Path, *, dtype: torch.dtype | None, device: torch.device | str, only: Collection[str], variant: str | None
) -> Model:
    """The model in a folder; `weights.load` says what the arguments mean."""
    index = files.read_json(folder / _INDEX)
    problems: list[str] = []
    if not str(index.get("_class_name", "")).startswith("StableDiffusion3"):
        problems.append(f"{folder / _INDEX}: _class_name is {index.get('_class_name')!r}, not {_PIPELINE!r}")
    schedule = attempt(problems, _read_schedule, folder, index)
    plans = {}
    for name, component in COMPONENTS.items():
        if name in only and attempt(problems, _present, folder, index, component):
            plans[name] = attempt(problems, _plan, SPECS[name], component, folder / component.folder, variant)
    tokenizers = {
        name: attempt(problems, _read_tokenizer, folder, index, tokenizer)
        for name, tokenizer in TOKENIZERS.items()
        if name in only
    }
    found = [plan for plan in plans.values() if plan]
    if variant and found and not any(plan.weights.variant for plan in found):
        problems.append(f"{folder}: no component has weights of the variant {variant!r}")
    if problems:
        raise WeightsError(problems)
    params = {name: _read_params(plan, dtype, device) for name, plan in plans.items()}
    config = Config(**{name: plan.config for name, plan in plans.items()}, schedule=schedule)
    return Model(config, params, Tokenizers(**tokenizers))


def write(folder: Path, model: Model, *, dtype: torch.dtype | None, shard_bytes: int | None) -> None:
    """Fill an empty folder with a model whose parameters fit its config."""
    index: dict[str, Any] = {"_class_name": _PIPELINE, "_diffusers_version": _FORMAT}
    for name, component in COMPONENTS.items():
        present = name in model.params
        index[component.folder] = [component.library, component.owner] if present else [None, None]
        if present:
            _write_component(folder / component.folder, name, model, dtype=dtype, shard_bytes=shard_bytes)
    for name, tokenizer in TOKENIZERS.items():
        tables = getattr(model.tokenizers, name)
        index[tokenizer.folder] = [None, None] if tables is None else ["transformers", tokenizer.owners[0]]
        if tables is not None:
            tokenizer.module.save(folder / tokenizer.folder, tables)
    place, owner = _SCHEDULER
    index[place] = [None, None] if model.config.schedule is None else ["diffusers", owner]
    if model.config.schedule is not None:
        values = configs.write(configs.SCHEDULE, model.config.schedule)
        _write_json(folder / place / "scheduler_config.json", {**_signature(owner), **values})
    _write_json(folder / _INDEX, index)


def _plan(spec: Any, component: Component, folder: Path, variant: str | None) -> _Plan:
    problems: list[str] = []
    config = attempt(problems, _read_config, component.table, folder / "config.json", component.owner)
    weights = attempt(
        problems, shards.open_weights, folder, component.stem, variant, component.library == "transformers"
    )
    if config is None or weights is None:
        raise WeightsError(problems)
    names = layout.canonical(component.layout, weights.tensors)
    entries = {proper: shards.entry(weights, name) for proper, name in names.items()}
    try:
        described = spec(config)
        problems = layout.check(component.layout, described, {name: entry.shape for name, entry in entries.items()})
    except (RuntimeError, OverflowError) as error:
        raise WeightsError(f"{folder / 'config.json'}: describes tensors too large to exist: {error}") from error
    for name, entry in entries.items():
        if not entry.dtype.is_floating_point:
            problems.append(f"{name} has dtype {entry.dtype}, not a float")
    if problems:
        raise WeightsError([f"{folder}: {problem}" for problem in problems])
    return _Plan(config, described, component.layout, weights, names)


def _read_params(plan: _Plan, dtype: torch.dtype | None, device: torch.device | str) -> Params:
    stored = next((shards.entry(plan.weights, name).dtype for name in plan.names.values()), torch.float32)

    def fetch(source: Source, param: Param) -> Tensor:
        names = [plan.names[name] for name in source.names if name in plan.names]
        if not names:
            # A table that the file lacks, because the spec can compute it.
            return param.init(prng.key(0), param.shape).to(device=device, dtype=dtype or stored)
        parts = [shards.tensor(plan.weights, name) for name in names]
        together = shards.stacked(plan.weights, names) if source.transform is layout.FUSE else None
        value = source.transform.join(parts) if together is None else together
        value = value.to(device=device, dtype=dtype).contiguous()
        if value.untyped_storage().data_ptr() != parts[0].untyped_storage().data_ptr():
            for name in names:
                shards.release(plan.weights, name)
        return value

    return layout.to_ours(plan.layout, plan.spec, fetch)


def _present(folder: Path, index: Mapping[str, Any], component: Component) -> bool:
    """Whether the index names the component, and names the class we know. A missing encoder is an absent one."""
    place = folder / component.folder
    if not _named(folder, index, component.folder, (component.owner,)):
        return False
    return not component.optional or os.path.lexists(place)


def _named(folder: Path, index: Mapping[str, Any], name: str, owners: Collection[str]) -> bool:
    value = index.get(name)
    if value is None or value == [None, None]:
        return False
    if not isinstance(value, list) or len(value) != 2 or value[1] not in owners:
        raise WeightsError(f"{folder / _INDEX}: {name} is {value!r}, only {' or '.join(owners)} is supported")
    return True


def _read_config(table: configs.Table, path: Path, owner: str) -> Any:
    values = files.read_json(path)
    if values.get("_class_name", owner) != owner:
        raise WeightsError(f"{path}: _class_name is {values['_class_name']!r}, only {owner!r} is supported")
    return configs.read(table, values, path)


def _read_schedule(folder: Path, index: Mapping[str, Any]) -> Any:
    place, owner = _SCHEDULER
    if not _named(folder, index, place, (owner,)):
        return None
    return _read_config(configs.SCHEDULE, folder / place / "scheduler_config.json", owner)


def _read_tokenizer(folder: Path, index: Mapping[str, Any], tokenizer: Tokenizer) -> Any:
    place = folder / tokenizer.folder
    if not _named(folder, index, tokenizer.folder, tokenizer.owners) or not os.path.lexists(place):
        return None
    try:
        return tokenizer.module.init(place)
    except OSError as error:
        raise WeightsError(f"{place}: cannot be read: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{place}: {error}") from error


def _write_component(
    folder: Path, name: str, model: Model, *, dtype: torch.dtype | None, shard_bytes: int | None
) -> None:
    component, config = COMPONENTS[name], getattr(model.config, name)
    leaves = tree.flatten_paths(model.params[name])
    tensors = layout.to_theirs(component.layout, SPECS[name](config), leaves)
    folder.mkdir()
    shards.write_weights(folder, component.stem, tensors, dtype=dtype, shard_bytes=shard_bytes)
    stored = str(dtype or next(iter(leaves.values())).dtype).removeprefix("torch.")
    said = {"torch_dtype": stored} if component.library == "transformers" else _signature(component.owner)
    _write_json(folder / "config.json", {**said, **configs.write(component.table, config)})


def _signature(owner: str) -> dict[str, str]:
    return {"_class_name": owner, "_diffusers_version": _FORMAT}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
