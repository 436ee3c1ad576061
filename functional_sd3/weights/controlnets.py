"""ControlNets on disk: diffusers' folder (`SD3ControlNetModel`) and Stability's single files for SD3.5-large.

Usage:

    net = weights.load_controlnet("sd3.5_large_controlnet_canny.safetensors")
    residuals = controlnet.apply(net.params, net.config, ...)
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from functional_sd3.core import tree
from functional_sd3.core.types import Params
from functional_sd3.formats import atomic, files, folder_kinds, shards
from functional_sd3.formats.default_dtype import Dtype
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.files import Mapped
from functional_sd3.formats.tensors import open_tensors
from functional_sd3.layouts import config_fields
from functional_sd3.layouts import controlnet as layouts
from functional_sd3.layouts.format import chosen
from functional_sd3.transformer import controlnet
from functional_sd3.weights import read
from functional_sd3.weights.read import ComponentFiles

OWNER = "SD3ControlNetModel"
# The first release that reads blocks of the image alone.
_FORMAT = "0.32.0"
_STEM = "diffusion_pytorch_model"
_CONFIG = "config.json"


class ControlNet(NamedTuple):
    """Parameters and config, the first arguments of `controlnet.apply`."""

    params: Params
    config: controlnet.Config


def load(
    path: str | os.PathLike,
    *,
    dtype: Dtype = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    finite: bool = True,
) -> ControlNet:
    """The ControlNet in diffusers' folder, or in one file of diffusers' or Stability's names (its config is then read
    off the shapes). dtype: as in `weights.load`. variant: of the folder's files.
    finite: whether NaN and infinities are refused.

    Raises WeightsError naming everything that is wrong with the files. Nothing loads in part.
    """
    return ControlNet(*read.load(find(path, variant=variant), dtype=dtype, device=device, finite=finite))


def find(path: str | os.PathLike, *, variant: str | None = None) -> ComponentFiles:
    """The files and config that `load` reads, with no value read yet. Raises WeightsError for anything else."""
    path = Path(path)
    if path.is_dir():
        if not (path / _CONFIG).exists() and (kind := folder_kinds.described(path)):
            raise WeightsError(f"{path}: is a folder without {_CONFIG} of a ControlNet{kind}")
        return atomic.read_stable(path, lambda folder: _find_in(folder, variant), (_CONFIG, f"{_STEM}.safetensors"))
    places = open_tensors(path)
    piece = ComponentFiles("ControlNet", chosen(layouts.FORMATS, places, "diffusers"), str(path), places)
    if layouts.KIND_TENSOR not in places:
        return piece
    return piece._replace(config=replace(read.config(piece), kind=_read_kind(places[layouts.KIND_TENSOR])))


def save(
    path: str | os.PathLike, net: ControlNet, *, layout: str = "diffusers", dtype: torch.dtype | None = None
) -> None:
    """Write diffusers' folder, or with layout="stability" one file, whole or not at all.

    Raises ValueError for a layout that does not exist or, of Stability's, that has no place for what the ControlNet is;
    WeightsError when the parameters do not fit the config or the system refuses.
    """
    if layout not in layouts.FORMATS:
        raise ValueError(f"layout {layout!r} of a ControlNet must be one of {', '.join(layouts.FORMATS)}")
    if layout == "stability":
        _check_stability(net.config)
    tensors = layouts.FORMATS[layout].tensors(net.config, tree.flatten_paths(net.params))
    if layout == "stability":
        if net.config.kind is not None:
            kind = controlnet.KINDS.index(net.config.kind)
            tensors[layouts.KIND_TENSOR] = torch.tensor([kind], dtype=torch.int32, device="cpu")
        files.write_atomic(path, tensors, metadata={"format": "pt"}, dtype=dtype)
        return
    values = {"_class_name": OWNER, "_diffusers_version": _FORMAT, **config_fields.write(layouts.TABLE, net.config)}

    def write(folder: Path) -> None:
        shards.write_weights(folder, _STEM, tensors, dtype=dtype, shard_bytes=None)
        (folder / _CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    atomic.replace_folder(path, write, (_CONFIG, f"{_STEM}.safetensors"))


def _find_in(folder: Path, variant: str | None) -> ComponentFiles:
    values = files.read_json(folder / _CONFIG)
    if values.get("_class_name", OWNER) != OWNER:
        owner = values["_class_name"]
        raise WeightsError(f"{folder / _CONFIG}: _class_name is {owner!r}, only {OWNER!r} is supported")
    config = layouts.read_config(values, folder / _CONFIG)
    places = shards.open_weights(folder, _STEM, variant, single_first=False).tensors
    return ComponentFiles("ControlNet", layouts.FORMATS["diffusers"], str(folder), places, config)


def _check_stability(config: controlnet.Config) -> None:
    if config.context_width is not None or config.has_patch_embedding or config.extra_channels:
        raise ValueError(
            "Stability's files hold ControlNets of the image alone, without patches or channels of their own; "
            'save this one with layout="diffusers"'
        )
    numbered = controlnet.KINDS[:3]
    if config.kind is not None and config.kind not in numbered:
        raise ValueError(f"Stability's files know the kinds {', '.join(numbered)}, not {config.kind!r}")


def _read_kind(mapped: Mapped) -> str:
    value = files.tensor(mapped, layouts.KIND_TENSOR).reshape(-1).tolist()
    if len(value) != 1 or value[0] not in (0, 1, 2):
        raise WeightsError(f"{mapped.path}: {layouts.KIND_TENSOR} is {value}, must be 0 (blur), 1 (canny) or 2 (depth)")
    return controlnet.KINDS[int(value[0])]
