"""Embeddings of the transformer: sinusoids of t, a 2-D table of positions, projected patches."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core import spec as specs
from functional_sd3.core.checks import check_floating, check_time
from functional_sd3.core.spec import Param
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.transformer.checks import check_shape

TIME_SCALE = 1000.0
"""The checkpoints read time as timesteps in [0, 1000]; everywhere else in this library t is in [0, 1]."""

TIME_FREQUENCIES = 256


def time_sinusoid(t: Tensor, size: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cosines, then sines of 1000 t at frequencies 10000^(-k / (size / 2)).

    t (...) in [0, 1], of any dtype -> (..., size) in `dtype`. Sinusoids of Vaswani et al. 2017, section 3.5, cosines
    first as in diffusers' `Timesteps(flip_sin_to_cos=True)`.
    """
    half = size // 2
    exponents = -math.log(10000.0) * torch.arange(half, dtype=dtype, device=t.device) / half
    # The axis before the product: torch 2.13 makes the tangent of a scalar float64 where a Python number multiplies it.
    angles = TIME_SCALE * t.to(dtype)[..., None] * torch.exp(exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(width: int, size: int, base_size: int) -> Tensor:
    """Sinusoidal 2-D position embedding of a size x size grid, row by row: (1, size * size, width), float32.

    Esser et al. 2024, section 5.3.2. The first half of `width` encodes the column, the second the row, each as sines,
    then cosines. Coordinates run from 0 to base_size whatever the size, so neighbours are base_size / size apart: SD3
    trains at base_size = 64 and crops the middle of a larger table. Computed in float64 and equal, bit for bit, to
    diffusers' buffer.

    Raises ValueError when `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width {width} of a position table must be a multiple of 4: sine, cosine of row, column")
    coordinates = torch.arange(size, dtype=torch.float32, device="cpu") / (size / base_size)
    quarter = torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width / 4)
    angles = torch.outer(coordinates.double(), 1.0 / 10000.0**quarter)
    line = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    columns = line[None, :, :].expand(size, size, -1)
    rows = line[:, None, :].expand(size, size, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, size * size, width)


def crop_positions(table: Tensor, height: int, width: int) -> Tensor:
    """The middle height x width of a square table (1, size * size, channels) -> (1, height * width, channels).

    Raises ValueError when the grid does not fit into the table.
    """
    size = math.isqrt(table.shape[1])
    if height > size or width > size:
        raise ValueError(f"a grid of {height} x {width} patches does not fit the position table of {size} x {size}")
    top, left = (size - height) // 2, (size - width) // 2
    square = table.unflatten(1, (size, size))
    return square[:, top : top + height, left : left + width].flatten(1, 2)


def embed_image(params: Params, patch_size: int, latents: Tensor) -> Tensor:
    """Patches of `latents` (batch, channels, height, width), projected, plus positions: (batch, tokens, width)."""
    patches = embed_patches(params["patch"], patch_size, latents)
    height, width = (side // patch_size for side in latents.shape[-2:])
    return (patches + crop_positions(params["position"], height, width)).to(latents.dtype)


def embed_patches(params: Params, size: int, latents: Tensor) -> Tensor:
    """Patches of size x size of latents (batch, channels, height, width), projected: (batch, tokens, width)."""
    patches = rearrange(latents, "batch c (h p) (w q) -> batch (h w) (c p q)", p=size, q=size)
    return layers.linear(layers.patches_linear(params), patches)


def embed_condition(
    params: Params,
    pooled_width: int,
    t: Tensor,
    pooled: Tensor,
    interval: Tensor | None = None,
    time_difference: float | None = None,
) -> Tensor:
    """Conditioning vector of the modulations: SiLU(MLP(sinusoid(t)) + MLP(pooled)), ([steps,] batch, width).

    It is y of figure 2 of Esser et al. 2024, after its SiLU; every modulation is a linear map of it. Where params has
    an embedder "interval", MLP(`interval_sinusoid`) is added, of 0 by default. t, pooled, interval, time_difference:
    as in `mmdit.apply`. The sinusoids are computed in float32, or in the parameters' dtype where that is wider.
    """
    check_time(t)
    check_floating("pooled", pooled)
    check_shape("pooled", pooled, "(batch, pooled_width)", (None, pooled_width))
    batch = pooled.shape[0]
    _check_times("t", t, batch)
    dtype = params["time"]["in"]["weight"].dtype
    embed = partial(_embed_time, params["time"])
    embedded = embed(t) if time_difference is None else with_difference(embed, t, time_difference)
    if "interval" in params:
        interval = torch.zeros_like(t) if interval is None else interval
        check_floating("interval", interval)
        _check_times("interval", interval, batch)
        wide = torch.promote_types(dtype, torch.float32)
        sinusoid = interval_sinusoid(interval, params["interval"]["in"]["weight"].shape[1], wide).to(dtype)
        embedded = embedded + _embedder(params["interval"], sinusoid)
    elif interval is not None:
        raise ValueError(
            "interval is given, but this model's velocity is that of one time: its config has no interval_size"
        )
    return F.silu(embedded + _embedder(params["pooled"], pooled.to(dtype)))


def with_difference(embed: Callable[[Tensor], Tensor], t: Tensor, h: float) -> Tensor:
    """embed(t) (..., width), whose first derivative in t is (embed(t + h) - embed(t - h)) / 2h.

    The sinusoids of 1000 t vary faster than any sampler follows; the difference is the derivative of their mean over
    [t - h, t + h]. At the ends of [0, 1] it is that of what is left of the interval. Its own derivative in t is 0.
    """
    if not 0 < h <= 1:
        raise ValueError(f"time_difference {h} must be above 0 and at most 1; 0.01 suits models trained on 1000 t")
    fixed = t.detach()
    low, high = (fixed - h).clamp_min(0.0), (fixed + h).clamp_max(1.0)
    slope = (embed(high) - embed(low)) / (high - low)[..., None]
    offset = (t - fixed)[..., None].to(slope.dtype)
    value = embed(fixed)
    return value + (offset * slope).to(value.dtype)


def interval_sinusoid(interval: Tensor, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cosines, then sines of pi k interval / 4, k from 0: (...) in [0, 1] -> (..., size) in `dtype`.

    Slow, unlike `time_sinusoid`: a mean velocity is differentiated in its interval's length t - r (MeanFlow, Geng et
    al. 2025, arXiv:2505.13447).
    """
    frequencies = math.pi / 4 * torch.arange(size // 2, dtype=dtype, device=interval.device)
    angles = interval.to(dtype)[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def embed_time(t: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """`time_sinusoid` (..., size) in `dtype`, computed in float32 where that is narrower."""
    return time_sinusoid(t, size, torch.promote_types(dtype, torch.float32)).to(dtype)


def embedder_spec(inputs: int, width: int, axis: str, *, zero: bool = False) -> Tree:
    """Parameters of the MLP that embeds the sinusoids of t, or the pooled text: (batch, inputs) -> (batch, width).

    axis: logical name of the inputs, of `spec.AXES`. zero: its output starts at zero, so that a model which has it
    starts as the one without.
    """
    normal = specs.normal(0.02)
    last = specs.zeros if zero else normal
    return {
        "in": layers.linear_spec(inputs, width, init=normal, axes=("width", axis)),
        "out": layers.linear_spec(width, width, init=last, axes=("width", "width")),
    }


def position_spec(width: int, size: int, base_size: int) -> Param:
    """A parameter that starts as `position_table(width, size, base_size)` and is not learned."""

    def table(key: Key, shape: tuple[int, ...]) -> Tensor:
        return position_table(width, size, base_size).to(key.device)

    return Param((1, size**2, width), table, (None, "positions", "width"), trainable=False)


def _embed_time(params: Params, t: Tensor) -> Tensor:
    return _embedder(params, embed_time(t, TIME_FREQUENCIES, params["in"]["weight"].dtype))


def _check_times(name: str, t: Tensor, batch: int) -> None:
    if t.ndim > 2 or (t.ndim and t.shape[-1] not in (1, batch)):
        raise ValueError(f"{name} {list(t.shape)} must be one number, ({batch},) or (steps, {batch}) as pooled has it")


def _embedder(params: Params, x: Tensor) -> Tensor:
    return layers.linear(params["out"], F.silu(layers.linear(params["in"], x)))
