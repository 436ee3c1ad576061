"""Velocities blended by place: prompts for regions of an image, and tiles of an image larger than the model can see.

Bar-Tal et al. 2023, "MultiDiffusion", arXiv:2302.08113: the velocity of the whole is the weighted mean of the
velocities of its parts, which is what their equation 5 minimises at every step. `blend_fields` and `tiles` return
functions called as `velocity` is, so they compose, and `sample` takes them as `field=`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import blend
from functional_sd3.core.types import Params, Velocity
from functional_sd3.flow.stepwise import RunVelocity, map_steps
from functional_sd3.image import vae
from functional_sd3.layouts.components import Config, require
from functional_sd3.pipeline import masks
from functional_sd3.pipeline.fields import Conditions, Field, velocity
from functional_sd3.transformer.control import Control

Window = tuple[slice, slice]
"""Rows and columns."""


class Region(NamedTuple):
    """A prompt and where it holds: mask (1, 1, height, width) in [0, 1], of any size and the image's proportions."""

    prompt: str
    mask: Tensor
    weight: float | Tensor = 0.5


def shares(regions: Sequence[Region], config: Config, latents: Tensor) -> Tensor:
    """Weights of the prompts in every latent: (1 + regions, 1, height, width), the image's own prompt first; they sum
    to 1. Latents take the mean of the pixels of a mask. Raises ValueError for masks of other proportions."""
    factor, (height, width) = vae.factor(require(config, "vae")), latents.shape[-2:]
    for region in regions:
        masks.check(region.mask, height * factor, width * factor, 1)
    weights = [masks.soft(region.mask, height, width).to(latents) * region.weight for region in regions]
    of_regions = torch.cat([latents.new_zeros(0, 1, height, width), *weights])
    total = of_regions.sum(0, keepdim=True)
    return torch.cat([(1 - total).clamp_min(0), of_regions]) / total.clamp_min(1)


def blend_fields(shares: Tensor, field: Field = velocity) -> Field:
    """The field of several conditions: sum_i shares_i v_i; shares (conditions, 1, height, width)."""

    def make(
        params: Params,
        config: Config,
        conditions: Sequence[Conditions],
        cfg: float | Tensor = 5.0,
        times: Any = None,
        **options: Any,
    ) -> RunVelocity:
        return map_steps(mean_of, *(field(params, config, each, cfg, times, **options) for each in conditions))

    def mean_of(*fields: Velocity) -> Velocity:
        def mean(x: Tensor, t: Tensor) -> Tensor:
            velocities = torch.stack([each(x, t).to(x.dtype) for each in fields])
            return (velocities * shares[:, None]).sum(0)

        return mean

    return make


def tiles(tile: int, overlap: int | None = None, field: Field = velocity) -> Field:
    """The field of images larger than `tile` latents a side: the velocities of overlapping tiles, blended.

    overlap: in latents, a quarter of the tile by default; a tile's weight falls off linearly over it. An image no
    larger than a tile is seen whole. Every tile has the whole prompt, and its part of the ControlNets' images.
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
        times: Any = None,
        *,
        control: Sequence[Control] = (),
        **options: Any,
    ) -> RunVelocity:
        def cut(x: Tensor) -> list[tuple[Window, Tensor]]:
            return windows(x, tile, overlap, require(config, "transformer").patch_size)

        def of(window: Window | None) -> RunVelocity:
            cropped = [_cropped(one, window) for one in control] if window else ()
            return field(params, config, conditions, cfg, times, control=cropped, **options)

        def mean_of(*fields: Velocity) -> Velocity:
            def mean(x: Tensor, t: Tensor) -> Tensor:
                total, weight = torch.zeros_like(x), x.new_zeros(x.shape[-2:])
                for index, (window, ramp) in enumerate(cut(x)):
                    part = fields[index if control else 0](x[(..., *window)], t)
                    total = total + _placed(part.to(x.dtype) * ramp, window, x)
                    weight = weight + _placed(ramp, window, weight)
                return total / weight

            return mean

        # Without ControlNets all tiles have the same field.
        windows_of_fields = [window for window, _ in cut(control[0].image_latents)] if control else [None]
        return map_steps(mean_of, *map(of, windows_of_fields))

    return make


def windows(x: Tensor, tile: int, overlap: int, patch: int = 1) -> list[tuple[Window, Tensor]]:
    """The tiles of x (..., height, width) as slices, each with its weights, shaped like the tile."""
    rows, columns = (_spans(side, tile, overlap, patch) for side in x.shape[-2:])
    return [
        (
            (slice(top, top + high), slice(left, left + wide)),
            torch.outer(
                blend.ramp(high, overlap, rises=top > 0, falls=top + high < x.shape[-2], like=x),
                blend.ramp(wide, overlap, rises=left > 0, falls=left + wide < x.shape[-1], like=x),
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


def _placed(part: Tensor, window: Window, like: Tensor) -> Tensor:
    """The part on zeros of the size of the whole."""
    rows, columns = window
    height, width = like.shape[-2:]
    margins = (columns.start, width - columns.stop, rows.start, height - rows.stop)
    return torch.nn.functional.pad(part, margins)


def _cropped(control: Control, window: Window) -> Control:
    return control._replace(image_latents=control.image_latents[(..., *window)])
