"""Files that accompany a model: ControlNets, IP-Adapters, LoRAs and textual inversions, described without loading."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from functional_sd3.formats import files, trees
from functional_sd3.formats.files import Mapped
from functional_sd3.formats.tensors import open_tensors
from functional_sd3.layouts import registry
from functional_sd3.lora import read as lora_read
from functional_sd3.weights import controlnets, ip_adapters, read
from functional_sd3.weights.read import ComponentFiles


class Extra(NamedTuple):
    """format: whose names its tensors have; config: its sizes as far as known; places: its tensors, not read."""

    kind: str
    format: str
    where: str
    config: Any
    places: dict[str, Mapped]


def find(path: Path, variant: str | None = None) -> Extra | None:
    """The file at a path, identified by the names inside; None for a model and for an unknown file.

    Raises WeightsError for what is damaged.
    """
    if path.is_dir():
        if (path / "config.json").is_file():
            claims = files.read_json(path / "config.json").get("_class_name")
            return _controlnet(path, variant) if claims == controlnets.OWNER else None
        names = () if (path / "model_index.json").exists() else lora_read.NAMES
        return next((_lora(path / name, variant) for name in names if (path / name).is_file()), None)
    if not path.is_file() or files.start(path)[8:9] != b"{":
        return None
    what = registry.foreign_kind(files.read_header(path).tensors) or ""
    chosen = next((kind for kind in _KINDS if what.partition(",")[0].endswith(" " + kind)), None)
    return _KINDS[chosen](path, variant) if chosen else None


def _controlnet(path: Path, variant: str | None) -> Extra:
    return _of_tree(controlnets.find(path, variant=variant))


def _ip_adapter(path: Path, variant: str | None) -> Extra:
    return _of_tree(ip_adapters.find(path))


def _of_tree(piece: ComponentFiles) -> Extra:
    owner = f"named as by {piece.format.owner}"
    return Extra(piece.component, owner, piece.where, read.config(piece), piece.places)


def _lora(path: Path, variant: str | None) -> Extra:
    layers = lora_read.layers(path)
    kinds = "\n".join(lora_read.summary(layers))
    return Extra("LoRA", f"of layers named as {layers[0].name}", str(path), kinds, open_tensors(path))


def _inversion(path: Path, variant: str | None) -> Extra:
    places = open_tensors(path)
    shapes = trees.shapes(places).items()
    sizes = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in shapes)
    return Extra("textual inversion", "vectors by encoder", str(path), f"vectors: {sizes}", places)


_KINDS: Mapping[str, Callable[[Path, str | None], Extra]] = {
    "ControlNet": _controlnet,
    "IP-Adapter": _ip_adapter,
    "LoRA": _lora,
    "textual inversion": _inversion,
}
