"""Prompts for regions of a picture, and pictures larger than the model can see at once: velocities blended by place.

Bar-Tal et al. 2023, "MultiDiffusion", arXiv:2302.08113: the velocity of the whole is the weighted mean of the
velocities of its parts, which is what their equation 5 minimises at every step. What makes a field of either kind has
the form of `velocity`, so they compose, and `sample` follows them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.types import Key, Params, Velocity
from functional_sd3.image import vae
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline import masks as mask_rules
from functional_sd3.pipeline.fields import Conditions, velocity
from functional_sd3.pipeline.image_to_image import divided
from functional_sd3.pipeline.latents import decode, initial_noise
from functional_sd3.pipeline.sampling import sample
from functional_sd3.pipeline.text_to_image import encode
from functional_sd3.transformer.control import Control
from functional_sd3.weights.model import Tokenizers

Field = Callable[..., Velocity]
"""Called as `velocity` is: (params, config, conditions, cfg, times, **options)."""

Window = tuple[slice, slice]
"""Rows and columns."""


class Region(NamedTuple):
    """A prompt and where it holds: mask (1, 1, height, width) in [0, 1], of any size and the picture's proportions."""

    prompt: str
    mask: Tensor
    weight: float | Tensor = 0.5


def regional(
    params: Params,
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    regions: Sequence[Region],
    key: Key,
    *,
    height: int | None = None,
    width: int | None = None,
    noise: Tensor | None = None,
    field: Field = velocity,
    **options: Any,
) -> Tensor:
    """Pictures of prompts with prompts of their own in regions: (batch, 3, height, width) in [0, 1], float32.

    Where the regions' masks times their weights add up to less than 1, the rest is the picture's own prompt's; where
    they add up to more, they share (`shares`). A region's prompt does not know of the others, and what it asks for is
    lost where the noise calls for it elsewhere; so let the picture's own prompt tell the whole, and keep it a share
    everywhere, which weights of 0.5 do. field: what makes the velocity of one prompt, such as `tiles(8)`. The rest as
    of `generate`; every region is evaluated at every step.
    """
    words, run = divided(options)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if noise is None:
        device = params["transformer"]["patch"]["weight"].device
        bounded = field is velocity
        noise = initial_noise(key, config, len(prompts), height, width, device=device, bounded=bounded)
    told = [
        encode(params, config, tokenizers, texts, **words)
        for texts in (prompts, *([region.prompt] * len(prompts) for region in regions))
    ]
    blend = blended(shares(regions, config, noise), field)
    return decode(params, config, sample(params, config, told, noise, field=blend, key=key, **run))


def shares(regions: Sequence[Region], config: Config, latents: Tensor) -> Tensor:
    """What part each prompt has in every latent: (1 + regions, 1, height, width), the picture's own prompt first; they
    add up to 1. Latents take the mean of the pixels of a mask. ValueError for masks of other proportions."""
    factor, size = vae.factor(config.vae), latents.shape[-2:]
    rows = [
        mask_rules.soft(mask_rules.checked(mask, size[0] * factor, size[1] * factor, 1), *size).to(latents) * weight
        for _, mask, weight in regions
    ]
    asked = torch.cat([latents.new_zeros(0, 1, *size), *rows])
    total = asked.sum(0, keepdim=True)
    return torch.cat([(1 - total).clamp_min(0), asked]) / total.clamp_min(1)


def blended(shares: Tensor, field: Field = velocity) -> Field:
    """The field of several conditions: sum_i shares_i v_i; shares (conditions, 1, height, width)."""

    def make(
        params: Params,
        config: Config,
        conditions: Sequence[Conditions],
        cfg: float | Tensor = 5.0,
        times: Tensor | None = None,
        **options: Any,
    ) -> Velocity:
        fields = [field(params, config, each, cfg, times, **options) for each in conditions]

        def mean(x: Tensor, t: Tensor) -> Tensor:
            answers = torch.stack([each(x, t).to(x.dtype) for each in fields])
            return (answers * shares[:, None]).sum(0)

        return mean

    return make


def tiles(tile: int, overlap: int | None = None, field: Field = velocity) -> Field:
    """The field of pictures larger than `tile` latents a side: what the model says of overlapping tiles, blended.

    overlap: in latents, a quarter of the tile by default; a tile's weight falls off linearly over it. A picture no
    larger than a tile is seen whole. Every tile is told the whole prompt, and its part of the ControlNets' pictures.
    Raises ValueError for an overlap that is not in [0, tile).
    """
    overlap = tile // 4 if overlap is None else overlap
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap {overlap} must be at least 0 and below the tile's {tile} latents")

    def make(
        params: Params,
        config: Config,
        conditions: Any,
        cfg: float | Tensor = 5.0,
        times: Tensor | None = None,
        *,
        control: Sequence[Control] = (),
        **options: Any,
    ) -> Velocity:
        def cut(x: Tensor) -> list[tuple[Window, Tensor]]:
            return windows(x, tile, overlap, config.transformer.patch_size)

        def of(window: Window | None) -> Velocity:
            heard = [_cropped(one, window) for one in control] if window else ()
            return field(params, config, conditions, cfg, times, control=heard, **options)

        # Without ControlNets all tiles are told the same.
        fields = [of(window) for window, _ in cut(control[0].image_latents)] if control else [of(None)]

        def mean(x: Tensor, t: Tensor) -> Tensor:
            total, weight = torch.zeros_like(x), x.new_zeros(x.shape[-2:])
            for index, (window, ramp) in enumerate(cut(x)):
                answer = fields[index if control else 0](x[(..., *window)], t)
                total = total + _placed(answer.to(x.dtype) * ramp, window, x)
                weight = weight + _placed(ramp, window, weight)
            return total / weight

        return mean

    return make


def tiled(
    params: Params,
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    key: Key,
    *,
    height: int,
    width: int,
    tile: int | None = None,
    overlap: int | None = None,
    noise: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Pictures of any size, larger than the table of positions too: (batch, 3, height, width) in [0, 1], float32.

    tile, overlap: of `tiles`, in pixels; the model's own size and a quarter of the tile by default. Decoded in tiles
    too. The rest as of `generate`.
    """
    words, run = divided(options)
    factor = vae.factor(config.vae)
    tile = config.transformer.sample_size if tile is None else tile // factor
    overlap = tile // 4 if overlap is None else overlap // factor
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if noise is None:
        device = params["transformer"]["patch"]["weight"].device
        noise = initial_noise(key, config, len(prompts), height, width, device=device, bounded=False)
    conditions = encode(params, config, tokenizers, prompts, **words)
    latents = sample(params, config, conditions, noise, field=tiles(tile, overlap), key=key, **run)
    return decode(params, config, latents, tile=max(tile, 2 * overlap))


def windows(x: Tensor, tile: int, overlap: int, patch: int = 1) -> list[tuple[Window, Tensor]]:
    """The tiles of x (..., height, width) as slices, each with its weights, shaped like the tile."""
    rows, columns = (_spans(side, tile, overlap, patch) for side in x.shape[-2:])
    return [
        (
            (slice(top, top + high), slice(left, left + wide)),
            torch.outer(
                _ramp(x, high, top > 0, top + high < x.shape[-2], overlap),
                _ramp(x, wide, left > 0, left + wide < x.shape[-1], overlap),
            ),
        )
        for top, high in rows
        for left, wide in columns
    ]


def _spans(side: int, tile: int, overlap: int, patch: int) -> list[tuple[int, int]]:
    """(start, length) of tiles that cover a side, evenly spread, starting at whole patches."""
    if side <= tile:
        return [(0, side)]
    count = -(-(side - overlap) // (tile - overlap))
    starts = [round(index * (side - tile) / (count - 1) / patch) * patch for index in range(count)]
    return [(start, tile) for start in starts]


def _ramp(like: Tensor, length: int, rises: bool, falls: bool, overlap: int) -> Tensor:
    slope = (torch.arange(length, device=like.device, dtype=like.dtype) + 1) / (overlap + 1)
    flat = torch.ones_like(slope)
    return torch.minimum(slope if rises else flat, slope.flip(0) if falls else flat).clamp_max(1)


def _placed(part: Tensor, window: Window, like: Tensor) -> Tensor:
    """The part on zeros of the size of the whole."""
    rows, columns = window
    height, width = like.shape[-2:]
    margins = (columns.start, width - columns.stop, rows.start, height - rows.stop)
    return torch.nn.functional.pad(part, margins)


def _cropped(control: Control, window: Window) -> Control:
    return control._replace(image_latents=control.image_latents[(..., *window)])
