"""Configs read off the shapes of tensors under our own paths: one function a component, whatever layout they came in.

What shapes cannot say is as in the released models: heads of 64 channels where there is no qk-norm, 32 groups, SD3's
scaling and shift; in models too small for 64 or 32, the largest power of two below that fits. As `sd3_impls.py` of
Stability-AI/sd3.5 reads a checkpoint, but dual attention and qk-norm are each told by tensors of their own.
"""

import math
import re
from collections.abc import Mapping

from functional_sd3.image import vae as vae_module
from functional_sd3.text import clip as clip_module
from functional_sd3.text import t5 as t5_module
from functional_sd3.transformer import mmdit

Shapes = Mapping[str, tuple[int, ...]]
_HEAD_DIM = 64


class Unreadable(KeyError):
    """The path of ours without which, or with whose shape, no config can be read."""


def transformer(shapes: Shapes) -> mmdit.Config:
    """The config of an MMDiT whose tensors (our paths) have these shapes."""
    width, channels, patch, _ = _shape(shapes, "patch.weight", 4)
    norms = [shape for path, shape in shapes.items() if path.endswith("_norm.weight") and len(shape) == 1 and shape[0]]
    outputs = _shape(shapes, "final.out.weight", 2)[0]
    head_dim = norms[0][0] if norms else math.gcd(width, _HEAD_DIM)
    return mmdit.Config(
        depth=len(_numbers(r"blocks\.(\d+)\..+", shapes)),
        heads=width // head_dim,
        head_dim=head_dim,
        patch_size=patch,
        in_channels=channels,
        out_channels=outputs // patch**2,
        context_width=_shape(shapes, "context.weight", 2)[1],
        pooled_width=_shape(shapes, "pooled.in.weight", 2)[1],
        position_size=_position_size(shapes),
        qk_norm=bool(norms),
        dual_attention_layers=tuple(_numbers(r"blocks\.(\d+)\.image\.attention2\..+", shapes)),
    )


def _position_size(shapes: Shapes) -> int:
    """The side of the table of positions, the released models' where there is none."""
    positions = shapes.get("position")
    if not positions:
        return mmdit.SD3_MEDIUM.position_size
    if len(positions) == 2:
        # ggml drops leading dimensions of 1; in other files it is missed when shapes are compared.
        positions = (1, *positions)
    return math.isqrt(_shape({"position": positions}, "position", 3)[1])


def vae(shapes: Shapes) -> vae_module.Config:
    """The config of a VAE; its encoder's levels tell the widths."""
    levels = _numbers(r"encoder\.levels\.(\d+)\..+", shapes)
    channels = [_shape(shapes, f"encoder.levels.{level}.blocks.0.conv1.weight", 4)[0] for level in levels]
    if not channels:
        raise Unreadable("encoder.levels.0.blocks.0.conv1.weight")
    return vae_module.Config(
        channels=tuple(channels),
        blocks_per_level=len(_numbers(r"encoder\.levels\.0\.blocks\.(\d+)\..+", shapes)),
        latent_channels=_shape(shapes, "decoder.conv_in.weight", 4)[1],
        groups=math.gcd(vae_module.SD3_VAE.groups, *channels),
    )


def clip(shapes: Shapes) -> clip_module.Config:
    """The config of a CLIP text encoder, but for the activation, which only tells L from G."""
    vocab, width = _shape(shapes, "token_embedding.weight", 2)
    return clip_module.Config(
        vocab=vocab,
        length=_shape(shapes, "position_embedding.weight", 2)[0],
        width=width,
        layers=len(_numbers(r"blocks\.(\d+)\..+", shapes)),
        heads=width // math.gcd(width, _HEAD_DIM),
        mlp_width=_shape(shapes, "blocks.0.mlp.in.weight", 2)[0],
        projection_width=shapes["projection.weight"][0] if shapes.get("projection.weight") else width,
    )


def t5(shapes: Shapes) -> t5_module.Config:
    """The config of a T5 encoder; its table of relative positions tells the heads."""
    vocab, width = _shape(shapes, "embedding.weight", 2)
    buckets, heads = _shape(shapes, "relative_bias.weight", 2)
    return t5_module.Config(
        vocab=vocab,
        width=width,
        layers=len(_numbers(r"blocks\.(\d+)\..+", shapes)),
        heads=heads,
        head_dim=_shape(shapes, "blocks.0.attention.out.weight", 2)[1] // heads,
        mlp_width=_shape(shapes, "blocks.0.mlp.out.weight", 2)[1],
        buckets=buckets,
    )


def _shape(shapes: Shapes, path: str, dimensions: int) -> tuple[int, ...]:
    shape = shapes.get(path, ())
    if len(shape) != dimensions or not all(shape):
        raise Unreadable(path)
    return shape


def _numbers(pattern: str, shapes: Shapes) -> list[int]:
    """The numbers that stand in the paths, each once. Counted rather than compared, a hostile one costs nothing."""
    found = {match[1] for path in shapes if (match := re.fullmatch(pattern, path))}
    return sorted(int(number) for number in found if len(number) < 5 and number.isascii() and number.isdecimal())
