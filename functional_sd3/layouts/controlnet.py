"""ControlNets in files: the names, configs and shapes of diffusers' `SD3ControlNetModel` and of Stability's files."""

import math
from pathlib import Path
from typing import Any

from functional_sd3.formats.errors import WeightsError
from functional_sd3.layouts import config_fields
from functional_sd3.layouts import diffusers_configs as configs
from functional_sd3.layouts.config_fields import Field, Fixed, Table, choice, flag, optional, whole
from functional_sd3.layouts.diffusers_keys import TRANSFORMER
from functional_sd3.layouts.format import Format
from functional_sd3.layouts.infer import Shapes, numbers, with_leading_ones
from functional_sd3.layouts.rules import Layout, renamed
from functional_sd3.transformer import controlnet

KIND_TENSOR = "control_type"
"""The number of its kind in a file of Stability's."""
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
    # Left over from the transformer's class, and never read.
    ignored=(KIND_TENSOR, "pos_embed.{*rest}", "x_embedder.{*rest}", "context_embedder.{*rest}"),
)
# Not known to diffusers, which skips what starts with an underline.
_KIND = "_control_type"
# Their default; ours is the released transformers'.
_POSITIONS = 96
_POOLED = "time_text_embed.text_embedder.linear_1.weight"
_STABILITYS_SIGN = "transformer_blocks.0.attn.qkv.weight"
_QUERY_NORM = "transformer_blocks.0.attn.norm_q.weight"
_OPTIONAL = {"pos_embed.proj.weight": 4, "pos_embed.pos_embed": 3, "context_embedder.weight": 2, _QUERY_NORM: 1}

_SHARED = {field.theirs: field for field in configs.TRANSFORMER.fields}
_DIFFERENT = ("joint_attention_dim", "pos_embed_max_size", "out_channels", "interval_size")
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


def infer(shapes: Shapes, drops_ones: bool = False) -> controlnet.Config:
    """The config that tensors of these shapes belong to, by diffusers' names or Stability's.

    Sizes that shapes do not determine are those of the released files: heads of 64 channels where there is no qk-norm,
    and zero pooled text exactly where there are joint blocks. Raises WeightsError when it is no ControlNet.
    """
    wanted = ("pos_embed_input.proj.weight", "controlnet_blocks.0.weight", _POOLED)
    dimensions = {**dict(zip(wanted, (4, 2, 2), strict=True)), **_OPTIONAL}
    shapes = with_leading_ones(shapes, dimensions, drops_ones)
    problems = [f"{name} is missing: this is not a ControlNet of SD3" for name in wanted if name not in shapes]
    problems += [
        f"{name} has shape {list(shapes[name])}, not {count} dimensions of at least 1"
        for name, count in dimensions.items()
        if name in shapes and (len(shapes[name]) != count or 0 in shapes[name])
    ]
    if problems:
        raise WeightsError(problems)
    stability = _STABILITYS_SIGN in shapes
    if stability and shapes[_POOLED][1] == shapes["controlnet_blocks.0.weight"][0]:
        raise WeightsError(
            "is a ControlNet of the kind that Stability's reference calls 2b, whose blocks all read the same "
            "tokens and the transformer's pooled text: none was released, and it is not computed here"
        )
    width, channels, patch_size, _ = shapes["pos_embed_input.proj.weight"]
    head_dim = (shapes.get(_QUERY_NORM) or (math.gcd(width, 64),))[0]
    own = None if stability else shapes.get("pos_embed.proj.weight")
    positions = None if own is None else shapes.get("pos_embed.pos_embed")
    context = None if stability else shapes.get("context_embedder.weight")
    return controlnet.Config(
        depth=len(numbers(r"controlnet_blocks\.(\d+)\.weight", shapes)),
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
        dual_attention_layers=tuple(numbers(r"transformer_blocks\.(\d+)\.attn2\.to_q\.weight", shapes)),
        zero_pooled=context is not None,
    )


def read_config(values: dict[str, Any], path: Path) -> controlnet.Config:
    """The config in the values of a file. Raises WeightsError naming every field that is unsupported."""
    return config_fields.read(TABLE, _with_positions(values, path), path)


def _with_positions(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The values with one field on positions, on which theirs have three together."""
    placed = values.get("pos_embed_type", "sincos")
    size = values.get("pos_embed_max_size", _POSITIONS)
    if placed not in (None, "sincos"):
        raise WeightsError(f"{path}: pos_embed_type is {placed!r}, must be 'sincos' or None")
    if values.get("use_pos_embed", True) is False or placed is None:
        return {**values, "pos_embed_type": None, "pos_embed_max_size": None}
    if size is None:
        raise WeightsError(f"{path}: pos_embed_max_size is None, but positions must have a size to be cropped from")
    return values


FORMATS = {
    "diffusers": Format(
        "diffusers",
        "ControlNet",
        "",
        r"transformer_blocks\.\d+\.attn\.to_q\.",
        controlnet.spec,
        DIFFUSERS,
        infer,
        TABLE,
    ),
    "stability": Format(
        "Stability", "ControlNet", "", r"transformer_blocks\.\d+\.attn\.qkv\.", controlnet.spec, STABILITY, infer, TABLE
    ),
}
