"""Configs read off the shapes of tensors under our own paths: one function a component, whatever layout they came in.

Sizes that shapes do not determine are those of the released models: heads of 64 channels where there is no qk-norm, 32
groups, SD3's scaling and shift; in models too small for 64 or 32, the largest power of two below that fits. As
`sd3_impls.py` of Stability-AI/sd3.5 reads a checkpoint, but dual attention and qk-norm each show in tensors of their
own.
"""

import math
import re
from collections.abc import Iterable, Mapping
from functools import partial

from functional_sd3.image import vae as vae_module
from functional_sd3.text import clip as clip_module
from functional_sd3.text import t5 as t5_module
from functional_sd3.text.clip import dual as clip_dual_module
from functional_sd3.text.clip import image as clip_image_module
from functional_sd3.transformer import mmdit

Shapes = Mapping[str, tuple[int, ...]]
_HEAD_DIM = 64
_POSITIONS = mmdit.SD3_MEDIUM.position_size


class Unreadable(KeyError):
    """The path of ours without which, or with whose shape, no config can be read."""


def transformer(shapes: Shapes, drops_ones: bool = False) -> mmdit.Config:
    """The config of an MMDiT whose tensors (our paths) have these shapes."""
    shape = partial(shape_of, shapes, drops_ones)
    width, channels, patch, _ = shape("patch.weight", 4)
    norms = [one for path, one in shapes.items() if path.endswith("_norm.weight") and len(one) == 1 and one[0]]
    outputs = shape("final.out.weight", 2)[0]
    head_dim = norms[0][0] if norms else math.gcd(width, _HEAD_DIM)
    return mmdit.Config(
        depth=len(numbers(r"blocks\.(\d+)\..+", shapes)),
        heads=width // head_dim,
        head_dim=head_dim,
        patch_size=patch,
        in_channels=channels,
        out_channels=outputs // patch**2,
        context_width=shape("context.weight", 2)[1],
        pooled_width=shape("pooled.in.weight", 2)[1],
        # The released models' where there is no table. Its leading 1 is missed, if it must be there, when shapes are
        # compared.
        position_size=math.isqrt(shape_of(shapes, True, "position", 3)[1]) if shapes.get("position") else _POSITIONS,
        qk_norm=bool(norms),
        dual_attention_layers=tuple(numbers(r"blocks\.(\d+)\.image\.attention2\..+", shapes)),
        interval_size=shape("interval.in.weight", 2)[1] if shapes.get("interval.in.weight") else 0,
    )


def vae(shapes: Shapes, drops_ones: bool = False) -> vae_module.Config:
    """The config of a VAE; its encoder's levels tell the widths."""
    shape = partial(shape_of, shapes, drops_ones)
    levels = numbers(r"encoder\.levels\.(\d+)\..+", shapes)
    channels = [shape(f"encoder.levels.{level}.blocks.0.conv1.weight", 4)[0] for level in levels]
    if not channels:
        raise Unreadable("encoder.levels.0.blocks.0.conv1.weight")
    return vae_module.Config(
        channels=tuple(channels),
        blocks_per_level=len(numbers(r"encoder\.levels\.0\.blocks\.(\d+)\..+", shapes)),
        latent_channels=shape("decoder.conv_in.weight", 4)[1],
        groups=math.gcd(vae_module.SD3_VAE.groups, *channels),
    )


def clip(shapes: Shapes, drops_ones: bool = False) -> clip_module.Config:
    """The config of a CLIP text encoder, but for the activation, in which L and G differ."""
    shape = partial(shape_of, shapes, drops_ones)
    vocab, width = shape("token_embedding.weight", 2)
    return clip_module.Config(
        vocab=vocab,
        length=shape("position_embedding.weight", 2)[0],
        width=width,
        layers=len(numbers(r"blocks\.(\d+)\..+", shapes)),
        heads=width // math.gcd(width, _HEAD_DIM),
        mlp_width=shape("blocks.0.mlp.in.weight", 2)[0],
        projection_width=shape("projection.weight", 2)[0] if shapes.get("projection.weight") else width,
    )


def clip_dual(shapes: Shapes, drops_ones: bool = False) -> clip_dual_module.Config:
    """The config of a CLIP with both encoders, with quick GELU as in all of OpenAI's."""
    shape = partial(shape_of, shapes, drops_ones)
    width, _, patch, _ = shape("image.patch.weight", 4)
    shape("text.projection.weight", 2)
    try:
        text = clip({path[5:]: one for path, one in shapes.items() if path.startswith("text.")}, drops_ones)
    except Unreadable as error:
        raise Unreadable(f"text.{error.args[0]}") from None
    image = clip_image_module.Config(
        size=patch * math.isqrt(shape("image.position_embedding.weight", 2)[0] - 1),
        patch=patch,
        width=width,
        layers=len(numbers(r"image\.blocks\.(\d+)\..+", shapes)),
        heads=width // math.gcd(width, _HEAD_DIM),
        mlp_width=shape("image.blocks.0.mlp.in.weight", 2)[0],
        projection_width=text.projection_width,
    )
    return clip_dual_module.Config(text, image)


def t5(shapes: Shapes, drops_ones: bool = False) -> t5_module.Config:
    """The config of a T5 encoder; the heads are counted in its table of relative positions."""
    shape = partial(shape_of, shapes, drops_ones)
    vocab, width = shape("embedding.weight", 2)
    buckets, heads = shape("relative_bias.weight", 2)
    return t5_module.Config(
        vocab=vocab,
        width=width,
        layers=len(numbers(r"blocks\.(\d+)\..+", shapes)),
        heads=heads,
        head_dim=shape("blocks.0.attention.out.weight", 2)[1] // heads,
        mlp_width=shape("blocks.0.mlp.out.weight", 2)[1],
        buckets=buckets,
    )


def with_leading_ones(shapes: Shapes, dimensions: Mapping[str, int], drops_ones: bool) -> dict[str, tuple[int, ...]]:
    """The shapes with the leading dimensions of 1 that ggml drops (`Header.drops_ones`), for the names of which the
    number of dimensions is given."""
    missing = {name: dimensions.get(name, 0) - len(one) if drops_ones else 0 for name, one in shapes.items()}
    return {name: (1,) * missing[name] + tuple(one) for name, one in shapes.items()}


def numbers(pattern: str, names: Iterable[str]) -> list[int]:
    """The numbers in the names, each once; counted rather than compared, so that a hostile one costs nothing."""
    digits = {match[1] for name in names if (match := re.fullmatch(pattern, name))}
    return sorted(int(number) for number in digits if len(number) < 5 and number.isascii() and number.isdecimal())


def shape_of(shapes: Shapes, drops_ones: bool, path: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a leaf that has so many dimensions. Raises Unreadable where it is missing or has others."""
    one = {path: shapes[path]} if path in shapes else {}
    shape = with_leading_ones(one, {path: dimensions}, drops_ones).get(path, ())
    if len(shape) != dimensions or not all(shape):
        raise Unreadable(path)
    return shape
