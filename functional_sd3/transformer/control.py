"""ControlNets in a run: their inputs, active step ranges and summed residuals."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.sequences import equal_runs
from functional_sd3.core.types import Params, Tree
from functional_sd3.transformer import controlnet, mmdit

MAX_SCALE = 10.0
"""The largest scale that is accepted, far above any with which a released ControlNet gives an image."""


class Control(NamedTuple):
    """A ControlNet and its control image.

    image_latents (batch or 1, channels, height, width): the encoded control image (`pipeline.control_latents`). scale:
    of the residuals, a number in [0, 10], or a tensor () or (batch,). start, end: the part of a run in which it is
    active, as fractions of its steps; step i of n is in it when start <= i / n and (i + 1) / n <= end (diffusers'
    rule). after_last: its residuals are added after the transformer's last block too, as Stability's reference does.
    """

    params: Params
    config: controlnet.Config
    image_latents: Tensor
    scale: float | Tensor = 1.0
    start: float = 0.0
    end: float = 1.0
    after_last: bool = False


class Residuals(NamedTuple):
    """The arguments `residuals` and `residual_after_last` of `mmdit.apply`."""

    residuals: Sequence[Tensor]
    after_last: bool


def check(control: Control, transformer: mmdit.Config) -> None:
    """Raises ValueError when a ControlNet was made for another transformer, or its numbers are out of range."""
    config = control.config
    for name in ("width", "patch_size", "in_channels", "pooled_width"):
        theirs, ours = getattr(config, name), getattr(transformer, name)
        if theirs != ours:
            raise ValueError(f"the ControlNet was made for another model: its {name} is {theirs}, the model's {ours}")
    if config.context_width not in (None, transformer.context_width):
        raise ValueError(
            f"the ControlNet was made for another model: its context is {config.context_width} wide, "
            f"the model's {transformer.context_width}"
        )
    if config.depth > transformer.depth:
        raise ValueError(
            f"the ControlNet was made for another model: it has {config.depth} blocks, "
            f"the model only {transformer.depth}"
        )
    scale = control.scale
    if not isinstance(scale, Tensor) and not 0 <= scale <= MAX_SCALE:
        raise ValueError(f"scale {scale} of a ControlNet must be in [0, {MAX_SCALE:g}]; 0 is none, 1 the usual")
    if not 0 <= control.start < control.end <= 1:
        raise ValueError(
            f"start {control.start} and end {control.end} of a ControlNet must be 0 <= start < end <= 1: "
            "fractions of the run"
        )


def segments(controls: Sequence[Control], steps: int) -> list[tuple[int, int, tuple[Control, ...]]]:
    """Runs of steps with the same active ControlNets, in order: (first step, step after the last, ControlNets)."""
    active = [
        tuple(index for index, control in enumerate(controls) if _is_active(control, step, steps))
        for step in range(steps)
    ]
    return [(first, stop, tuple(controls[index] for index in active[first])) for first, stop in equal_runs(active)]


def per_sample(controls: Sequence[Control], batch: int) -> list[dict[str, Tensor]]:
    """Control latents and scale of each ControlNet, one row per sample; guidance stacks and splits them."""
    return [
        {
            "image_latents": _expand("control images", control.image_latents, batch),
            "scale": _expand("scales", _scale_row(control), batch),
        }
        for control in controls
    ]


def modulations(controls: Sequence[Control], t: Tensor, pooled: Tensor) -> list[Tree]:
    """`controlnet.modulations` of each, with the pooled embedding that it was trained with."""
    return [controlnet.modulations(control.params, control.config, t, _pooled(control, pooled)) for control in controls]


def residuals(
    controls: Sequence[Control],
    params: Params,
    config: mmdit.Config,
    latents: Tensor,
    t: Tensor,
    context: Tensor,
    pooled: Tensor,
    *,
    modulations: Sequence[Tree] | None = None,
    **options: Any,
) -> Residuals:
    """Summed residuals of all controls, for a transformer (`params`, `config`) at `latents`.

    latents, t, context, pooled: as in `mmdit.apply`. modulations: those of `modulations`. The ControlNets may have
    different numbers of blocks. start and end have no effect here: `segments` selects the active ControlNets of a run.
    """
    lists = []
    for control, modulation in zip(controls, modulations or [None] * len(controls), strict=True):
        if control.image_latents.shape[-2:] != latents.shape[-2:]:
            size, wanted = (" x ".join(map(str, x.shape[-2:])) for x in (control.image_latents, latents))
            raise ValueError(f"a control image has latents of {size}, but the noised latents have {wanted}")
        inputs = latents
        if not control.config.has_patch_embedding:
            inputs = mmdit.embed_image(params, config, latents.to(params["patch"]["weight"].dtype))
        lists.append(
            controlnet.apply(
                control.params,
                control.config,
                inputs,
                t,
                context,
                _pooled(control, pooled),
                control.image_latents,
                control.scale,
                modulations=modulation,
                **options,
            )
        )
    return combine(lists, [control.after_last for control in controls], config.depth)


def combine(residuals: Sequence[Sequence[Tensor]], after_last: Sequence[bool], depth: int) -> Residuals:
    """One list of residuals that has the effect of several, summed: `mmdit.apply` adds the same to each block."""
    if not residuals:
        return Residuals((), False)
    if len({len(part) for part in residuals}) == 1 and len(set(after_last)) == 1:
        return Residuals([_sum(parts) for parts in zip(*residuals, strict=True)], after_last[0])
    # The lists differ in length or in `after_last`: one residual for each block, the last block's from `after_last`.
    blocks = []
    for block in range(depth):
        terms = [
            part[mmdit.residual_index(block, depth, len(part))]
            for part, last in zip(residuals, after_last, strict=True)
            if last or block < depth - 1
        ]
        blocks.append(_sum(terms) if terms else torch.zeros_like(residuals[0][0]))
    return Residuals(blocks, any(after_last))


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _is_active(control: Control, step: int, steps: int) -> bool:
    return control.start <= step / steps and (step + 1) / steps <= control.end


def _pooled(control: Control, pooled: Tensor) -> Tensor:
    return torch.zeros_like(pooled) if control.config.zero_pooled else pooled


def _scale_row(control: Control) -> Tensor:
    like = control.image_latents
    if not isinstance(control.scale, Tensor):
        return torch.full((1,), float(control.scale), device=like.device, dtype=torch.float32)
    return control.scale.reshape(1) if control.scale.ndim == 0 else control.scale


def _expand(name: str, x: Tensor, batch: int) -> Tensor:
    if x.shape[0] not in (1, batch):
        raise ValueError(f"{x.shape[0]} {name} of a ControlNet for {batch} samples; give one, or one for each")
    return x.expand(batch, *x.shape[1:])
