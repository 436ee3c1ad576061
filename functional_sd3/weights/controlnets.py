"""ControlNets on disk: diffusers' folder (`SD3ControlNetModel`) and Stability's single files for SD3.5-large.

Usage:

    net = weights.load_controlnet("sd3.5_large_controlnet_canny.safetensors")
    residuals = controlnet.apply(net.params, net.config, ...)
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from functional_sd3.core.types import Params
from functional_sd3.formats import atomic, files, shards
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.files import Mapped
from functional_sd3.layouts import config_fields
from functional_sd3.layouts import diffusers_configs as configs
from functional_sd3.layouts.config_fields import Field, Fixed, Table, choice, flag, optional, whole
from functional_sd3.layouts.diffusers_keys import TRANSFORMER
from functional_sd3.layouts.rules import Layout, renamed
from functional_sd3.transformer import controlnet
from functional_sd3.weights import tree_file
from functional_sd3.weights.default_dtype import Dtype

OWNER = "SD3ControlNetModel"
# The first release that reads blocks of the image alone.
_FORMAT = "0.32.0"
_STEM = "diffusion_pytorch_model"
_CONFIG = "config.json"
# Their default; ours is the released transformers'.
_POSITIONS = 96
# Not known to diffusers, which skips what starts with an underline.
_KIND = "_control_type"
# What a file of Stability's numbers its kind by.
_KIND_TENSOR = "control_type"
LAYOUTS = ("diffusers", "stability")


class ControlNet(NamedTuple):
    """Parameters and config, the first arguments of `controlnet.apply`."""

    params: Params
    config: controlnet.Config


class Found(NamedTuple):
    """A ControlNet that was found and is still to be read: its tensors by the names of `table`."""

    where: str
    places: dict[str, Mapped]
    table: Layout
    config: controlnet.Config


_OWN = renamed(
    ("control_patch.{leaf}", "pos_embed_input.proj.{leaf}"),
    ("residuals.{i}.{leaf}", "controlnet_blocks.{i}.{leaf}"),
)
DIFFUSERS = Layout((*_OWN, *TRANSFORMER.rules))
_OURS, _THEIRS = "blocks.{i}.image", "transformer_blocks.{i}"
STABILITY = Layout(
    (
        *_OWN,
        *renamed(
            (_OURS + ".modulation.{leaf}", _THEIRS + ".adaLN_modulation.1.{leaf}"),
            (_OURS + ".attention.qkv.{leaf}", _THEIRS + ".attn.qkv.{leaf}"),
            (_OURS + ".attention.out.{leaf}", _THEIRS + ".attn.proj.{leaf}"),
            (_OURS + ".mlp.in.{leaf}", _THEIRS + ".mlp.fc1.{leaf}"),
            (_OURS + ".mlp.out.{leaf}", _THEIRS + ".mlp.fc2.{leaf}"),
        ),
        *TRANSFORMER.rules,
    ),
    # Left over from the transformer's class, and read by nobody.
    ignored=(_KIND_TENSOR, "pos_embed.{*rest}", "x_embedder.{*rest}", "context_embedder.{*rest}"),
)
_POOLED = "time_text_embed.text_embedder.linear_1.weight"
_STABILITYS_SIGN = "transformer_blocks.0.attn.qkv.weight"
_QUERY_NORM = "transformer_blocks.0.attn.norm_q.weight"
_OPTIONAL = {"pos_embed.proj.weight": 4, "pos_embed.pos_embed": 3, "context_embedder.weight": 2, _QUERY_NORM: 1}

_SHARED = {field.theirs: field for field in configs.TRANSFORMER.fields}
_DIFFERENT = ("joint_attention_dim", "pos_embed_max_size", "out_channels")
TABLE = Table(
    controlnet.Config,
    (
        *(field for name, field in _SHARED.items() if name not in _DIFFERENT),
        Field("joint_attention_dim", "context_width", optional(_SHARED["joint_attention_dim"].read), 4096),
        Field("pos_embed_max_size", "position_size", optional(_SHARED["pos_embed_max_size"].read), _POSITIONS),
        Field("extra_conditioning_channels", "extra_channels", whole(0, 2**16), 0),
        Field("use_pos_embed", "has_patch_embedding", flag, True),
        Field("force_zeros_for_pooled_projection", "zero_pooled", flag, True),
        Field(_KIND, "kind", optional(choice(*controlnet.KINDS)), None),
    ),
    (
        Fixed("pos_embed_type", lambda config: None if config.position_size is None else "sincos", "sincos"),
        # Only joint blocks have a context, whose weights tell its width.
        Fixed("caption_projection_dim", lambda config: config.width, checked=False),
        Fixed("out_channels", lambda config: config.in_channels, checked=False),
    ),
    unsound=configs.unsound_transformer,
)


def load(
    path: str | os.PathLike,
    *,
    dtype: Dtype = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    finite: bool = True,
) -> ControlNet:
    """The ControlNet in diffusers' folder, or in one file of diffusers' or Stability's names (its config is then read
    off the shapes: `infer`). dtype: as of `weights.load`. variant: of the folder's files.
    finite: whether NaN and infinities are refused.

    Raises WeightsError naming everything that is wrong with the files. Nothing loads in part.
    """
    where, places, table, config = find(path, variant=variant)
    params = tree_file.read(where, places, table, controlnet.spec(config), dtype=dtype, device=device, finite=finite)
    return ControlNet(params, config)


def find(path: str | os.PathLike, *, variant: str | None = None) -> Found:
    """The files and config that `load` reads, with no value read yet. Raises WeightsError for anything else."""
    path = Path(path)
    if path.is_dir():
        return atomic.read_stable(path, lambda folder: _find_in(folder, variant), (_CONFIG, f"{_STEM}.safetensors"))
    places = tree_file.open_file(path)
    config = infer(tree_file.shapes(places), path)
    table = STABILITY if _STABILITYS_SIGN in places else DIFFUSERS
    if _KIND_TENSOR in places:
        config = controlnet.Config(**{**vars(config), "kind": _read_kind(places[_KIND_TENSOR])})
    return Found(str(path), places, table, config)


def save(
    path: str | os.PathLike, net: ControlNet, *, layout: str = "diffusers", dtype: torch.dtype | None = None
) -> None:
    """Write diffusers' folder, or with layout="stability" one file, whole or not at all.

    Raises ValueError for a layout that does not exist or, of Stability's, that has no place for what the ControlNet is;
    WeightsError when the parameters do not fit the config or the system refuses.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} of a ControlNet must be one of {', '.join(LAYOUTS)}")
    spec = controlnet.spec(net.config)
    if layout == "stability":
        _check_stability(net.config)
        found = tree_file.tensors(STABILITY, spec, net.params)
        if net.config.kind is not None:
            kind = controlnet.KINDS.index(net.config.kind)
            found[_KIND_TENSOR] = torch.tensor([kind], dtype=torch.int32, device="cpu")
        files.write_atomic(path, found, metadata={"format": "pt"}, dtype=dtype)
        return
    found = tree_file.tensors(DIFFUSERS, spec, net.params)
    values = {"_class_name": OWNER, "_diffusers_version": _FORMAT, **config_fields.write(TABLE, net.config)}

    def write(folder: Path) -> None:
        shards.write_weights(folder, _STEM, found, dtype=dtype, shard_bytes=None)
        (folder / _CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    atomic.replace_folder(path, write, (_CONFIG, f"{_STEM}.safetensors"))


def infer(shapes: Mapping[str, tuple[int, ...]], path: Any = "the file") -> controlnet.Config:
    """The config that tensors of these shapes belong to, by diffusers' names or Stability's.

    What shapes do not tell is as in the released files: heads of 64 channels where there is no qk-norm, and zero pooled
    text exactly where there are joint blocks. Raises WeightsError when it is no ControlNet.
    """
    wanted = ("pos_embed_input.proj.weight", "controlnet_blocks.0.weight", _POOLED)
    problems = [f"{path}: {name} is missing: this is not a ControlNet of SD3" for name in wanted if name not in shapes]
    dimensions = {**dict(zip(wanted, (4, 2, 2), strict=True)), **_OPTIONAL}
    problems += [
        f"{path}: {name} has shape {list(shapes[name])}, not {count} dimensions of at least 1"
        for name, count in dimensions.items()
        if name in shapes and (len(shapes[name]) != count or 0 in shapes[name])
    ]
    if problems:
        raise WeightsError(problems)
    stability = _STABILITYS_SIGN in shapes
    if stability and shapes[_POOLED][1] == shapes["controlnet_blocks.0.weight"][0]:
        raise WeightsError(
            f"{path}: is a ControlNet of the kind that Stability's reference calls 2b, whose blocks all read the same "
            "tokens and the transformer's pooled text: none was released, and it is not computed here"
        )
    width, channels, patch_size, _ = shapes["pos_embed_input.proj.weight"]
    head_dim = (shapes.get(_QUERY_NORM) or (math.gcd(width, 64),))[0]
    own = None if stability else shapes.get("pos_embed.proj.weight")
    positions = None if own is None else shapes.get("pos_embed.pos_embed")
    context = None if stability else shapes.get("context_embedder.weight")
    return controlnet.Config(
        depth=_count(r"controlnet_blocks\.(\d+)\.weight", shapes),
        heads=width // head_dim,
        head_dim=head_dim,
        patch_size=patch_size,
        in_channels=own[1] if own else channels,
        extra_channels=channels - own[1] if own else 0,
        context_width=context[-1] if context else None,
        pooled_width=shapes[_POOLED][1],
        has_patch_embedding=own is not None,
        position_size=math.isqrt(positions[1]) if positions else None,
        qk_norm=_QUERY_NORM in shapes,
        dual_attention_layers=tuple(sorted(_numbers(r"transformer_blocks\.(\d+)\.attn2\.to_q\.weight", shapes))),
        zero_pooled=context is not None,
    )


def _find_in(folder: Path, variant: str | None) -> Found:
    values = files.read_json(folder / _CONFIG)
    if values.get("_class_name", OWNER) != OWNER:
        owner = values["_class_name"]
        raise WeightsError(f"{folder / _CONFIG}: _class_name is {owner!r}, only {OWNER!r} is supported")
    config = config_fields.read(TABLE, _with_positions(values, folder / _CONFIG), folder / _CONFIG)
    places = shards.open_weights(folder, _STEM, variant, single_first=False).tensors
    return Found(str(folder), places, DIFFUSERS, config)


def _with_positions(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The values with one word on positions, which theirs tell by three fields together."""
    placed = values.get("pos_embed_type", "sincos")
    size = values.get("pos_embed_max_size", _POSITIONS)
    if placed not in (None, "sincos"):
        raise WeightsError(f"{path}: pos_embed_type is {placed!r}, must be 'sincos' or None")
    if values.get("use_pos_embed", True) is False or placed is None:
        return {**values, "pos_embed_type": None, "pos_embed_max_size": None}
    if size is None:
        raise WeightsError(f"{path}: pos_embed_max_size is None, but positions must have a size to be cropped from")
    return values


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
    value = files.tensor(mapped, _KIND_TENSOR).reshape(-1).tolist()
    if len(value) != 1 or value[0] not in (0, 1, 2):
        raise WeightsError(f"{mapped.path}: {_KIND_TENSOR} is {value}, must be 0 (blur), 1 (canny) or 2 (depth)")
    return controlnet.KINDS[int(value[0])]


def _numbers(pattern: str, names: Mapping[str, Any]) -> set[int]:
    return {int(match[1]) for name in names if (match := re.fullmatch(pattern, name)) and len(match[1]) < 5}


def _count(pattern: str, names: Mapping[str, Any]) -> int:
    return len(_numbers(pattern, names))
