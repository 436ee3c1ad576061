"""The folder of SD3 and SD3.5 as diffusers writes it: `model_index.json` and a folder for each component.

    model_index.json  scheduler/  text_encoder{,_2,_3}/  tokenizer{,_2,_3}/  transformer/  vae/

A `taesd/` beside them, which diffusers does not look for, holds an `AutoencoderTiny`; so may `vae/`.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from functional_sd3.core import tree
from functional_sd3.formats import files, shards
from functional_sd3.formats.errors import WeightsError, attempt, reason
from functional_sd3.layouts import config_fields
from functional_sd3.layouts import diffusers_configs as configs
from functional_sd3.layouts.diffusers_folder import (
    COMPONENTS,
    INDEX,
    SCHEDULER,
    TAESD,
    TOKENIZERS,
    Component,
    Tokenizer,
)
from functional_sd3.weights.model import Model
from functional_sd3.weights.read import ComponentFiles, Discovered

# The first release whose transformer has everything of SD3.5 (dual attention, qk norm).
_FORMAT = "0.31.0"
_PIPELINE = "StableDiffusion3Pipeline"
BASE = "_base_model"
"""Key of the index: the folder, relative to this one, of what this one lacks (`base_folder`)."""


class Opened(NamedTuple):
    """Contents of a folder, and whether none of the components there has weights of the variant that is wanted."""

    contents: Discovered
    lacks_variant: bool

    def checked(self, folder: Path, variant: str | None) -> Discovered:
        """The contents, with the lack of the variant as a problem."""
        if not self.lacks_variant:
            return self.contents
        problem = f"{folder}: no component has weights of the variant {variant!r}"
        return self.contents._replace(problems=(*self.contents.problems, problem))


def open_folder(folder: Path, only: Collection[str], variant: str | None) -> Opened:
    """Contents of a folder; arguments as in `weights.load`. Problems are collected, not raised."""
    index = files.read_json(folder / INDEX)
    problems: list[str] = []
    if not str(index.get("_class_name", "")).startswith("StableDiffusion3"):
        problems.append(f"{folder / INDEX}: _class_name is {index.get('_class_name')!r}, not {_PIPELINE!r}")
    schedule = attempt(problems, _read_schedule, folder, index)
    pieces: list[ComponentFiles] = []
    variants: list[str | None] = []
    for name, component in _components(folder, index).items():
        if name in only and attempt(problems, _present, folder, index, component):
            opened = attempt(problems, open_component, name, component, folder / component.folder, variant)
            pieces += opened[:1] if opened else []
            variants += opened[1:] if opened else []
    tokenizers = {
        name: attempt(problems, _read_tokenizer, folder, index, tokenizer)
        for name, tokenizer in TOKENIZERS.items()
        if name in only
    }
    present = {name: tables for name, tables in tokenizers.items() if tables is not None}
    contents = Discovered(pieces, present, schedule, True, tuple(problems))
    return Opened(contents, bool(variant and pieces and not any(variants)))


def write(
    folder: Path, model: Model, *, dtype: torch.dtype | None, shard_bytes: int | None, base: str | None = None
) -> None:
    """Fill an empty folder with a model whose parameters fit its config; base: the folder of what it lacks."""
    index: dict[str, Any] = {"_class_name": _PIPELINE, "_diffusers_version": _FORMAT}
    if base is not None:
        index[BASE] = base
    for name, component in COMPONENTS.items():
        present = name in model.params
        index[component.folder] = [component.library, component.owner] if present else [None, None]
        if present:
            _write_component(folder / component.folder, name, model, dtype=dtype, shard_bytes=shard_bytes)
    if "taesd" in model.params:
        _write_component(folder / TAESD.folder, "taesd", model, dtype=dtype, shard_bytes=shard_bytes)
    for name, tokenizer in TOKENIZERS.items():
        tables = getattr(model.tokenizers, name)
        index[tokenizer.folder] = [None, None] if tables is None else ["transformers", tokenizer.owners[0]]
        if tables is not None:
            tokenizer.module.save(folder / tokenizer.folder, tables)
    place, owner = SCHEDULER
    index[place] = [None, None] if model.config.schedule is None else ["diffusers", owner]
    if model.config.schedule is not None:
        values = config_fields.write(configs.SCHEDULE, model.config.schedule)
        _write_json(folder / place / "scheduler_config.json", {**_signature(owner), **values})
    _write_json(folder / INDEX, index)


def _components(folder: Path, index: Mapping[str, Any]) -> dict[str, Component]:
    """Name -> place of each component, with TAESD in either of its places."""
    components = dict(COMPONENTS)
    if index.get("vae") == [TAESD.library, TAESD.owner]:
        components.pop("vae")
        components["taesd"] = TAESD._replace(folder="vae")
    elif os.path.lexists(folder / TAESD.folder / "config.json"):
        components["taesd"] = TAESD
    return components


def open_component(
    name: str, component: Component, folder: Path, variant: str | None
) -> tuple[ComponentFiles, str | None]:
    """A component that is mapped and not yet checked, and the variant its files are of."""
    problems: list[str] = []
    config = attempt(problems, _read_config, configs.TABLES[name], folder / "config.json", component.owner)
    weights = attempt(
        problems, shards.open_weights, folder, component.stem, variant, component.library == "transformers"
    )
    if problems or weights is None:
        raise WeightsError(problems)
    return ComponentFiles(name, component.format, str(folder), weights.tensors, config), weights.variant


def _present(folder: Path, index: Mapping[str, Any], component: Component) -> bool:
    """True if the index names the component, with the class we know. A missing encoder is an absent one."""
    place = folder / component.folder
    if component == TAESD:
        return True
    if not _named(folder, index, component.folder, (component.owner,)):
        return False
    return not component.optional or os.path.lexists(place)


def _named(folder: Path, index: Mapping[str, Any], name: str, owners: Collection[str]) -> bool:
    value = index.get(name)
    if value is None or value == [None, None]:
        return False
    if not isinstance(value, list) or len(value) != 2 or value[1] not in owners:
        raise WeightsError(f"{folder / INDEX}: {name} is {value!r}, only {' or '.join(owners)} is supported")
    return True


def _read_config(table: config_fields.Table, path: Path, owner: str) -> Any:
    values = files.read_json(path)
    if values.get("_class_name", owner) != owner:
        raise WeightsError(f"{path}: _class_name is {values['_class_name']!r}, only {owner!r} is supported")
    return config_fields.read(table, values, path)


def _read_schedule(folder: Path, index: Mapping[str, Any]) -> Any:
    place, owner = SCHEDULER
    if not _named(folder, index, place, (owner,)):
        return None
    return _read_config(configs.SCHEDULE, folder / place / "scheduler_config.json", owner)


def _read_tokenizer(folder: Path, index: Mapping[str, Any], tokenizer: Tokenizer) -> Any:
    place = folder / tokenizer.folder
    if not _named(folder, index, tokenizer.folder, tokenizer.owners) or not os.path.lexists(place):
        return None
    return read_tokenizer(place, tokenizer)


def read_tokenizer(place: Path, tokenizer: Tokenizer) -> Any:
    """The tables in a tokenizer's folder. Raises WeightsError when they cannot be read."""
    try:
        return tokenizer.module.init(place)
    except WeightsError:
        raise
    except OSError as error:
        raise WeightsError(f"{place}: cannot be read: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{place}: {error}") from error


def _write_component(
    folder: Path, name: str, model: Model, *, dtype: torch.dtype | None, shard_bytes: int | None
) -> None:
    component, config = {**COMPONENTS, "taesd": TAESD}[name], getattr(model.config, name)
    tensors = component.format.tensors(config, tree.flatten_paths(model.params[name]))
    folder.mkdir()
    shards.write_weights(folder, component.stem, tensors, dtype=dtype, shard_bytes=shard_bytes)
    stored = str(dtype or next(iter(tensors.values())).dtype).removeprefix("torch.")
    fields = {"torch_dtype": stored} if component.library == "transformers" else _signature(component.owner)
    _write_json(folder / "config.json", {**fields, **config_fields.write(configs.TABLES[name], config)})


def _signature(owner: str) -> dict[str, str]:
    return {"_class_name": owner, "_diffusers_version": _FORMAT}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
