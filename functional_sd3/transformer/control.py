"""ControlNets in a run: what one is told, when it speaks, and how several speak together."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.types import Params, Tree
from functional_sd3.transformer import controlnet, mmdit

MOST = 10.0
"""Scales beyond are refused: no released ControlNet makes a picture there."""


class Control(NamedTuple):
    """A ControlNet and its picture.

    image_latents (batch or 1, channels, height, width): what `pipeline.control_latents` makes of the picture. scale: of
    the residuals, a number in [0, 10], or a tensor () or (batch,). start, end: the part of a run in which it speaks, as
    fractions of its steps; step i of n is in it when start <= i / n and (i + 1) / n <= end (diffusers' rule).
    after_last: its residuals are added after the transformer's last block too, as Stability's reference does.
    """

    params: Params
    config: controlnet.Config
    image_latents: Tensor
    scale: float | Tensor = 1.0
    start: float = 0.0
    end: float = 1.0
    after_last: bool = False


class Residuals(NamedTuple):
    """What `mmdit.apply` takes as `residuals` and `residual_after_last`."""

    residuals: Sequence[Tensor]
    after_last: bool


def check(control: Control, transformer: mmdit.Config) -> None:
    """Raises ValueError when a ControlNet was made for another transformer, or its numbers are out of range."""
    own = control.config
    for name in ("width", "patch_size", "in_channels", "pooled_width"):
        theirs, ours = getattr(own, name), getattr(transformer, name)
        if theirs != ours:
            raise ValueError(f"the ControlNet was made for another model: its {name} is {theirs}, the model's {ours}")
    if own.context_width not in (None, transformer.context_width):
        wide = f"{own.context_width} wide, the model's {transformer.context_width}"
        raise ValueError(f"the ControlNet was made for another model: its context is {wide}")
    if own.depth > transformer.depth:
        raise ValueError(
            f"the ControlNet was made for another model: it has {own.depth} blocks, the model only {transformer.depth}"
        )
    scale = control.scale
    if not isinstance(scale, Tensor) and not 0 <= scale <= MOST:
        raise ValueError(f"scale {scale} of a ControlNet must be in [0, {MOST:g}]; 0 is none, 1 the usual")
    if not 0 <= control.start < control.end <= 1:
        raise ValueError(
            f"start {control.start} and end {control.end} of a ControlNet must be 0 <= start < end <= 1: "
            "fractions of the run"
        )


def segments(controls: Sequence[Control], steps: int) -> list[tuple[int, int, tuple[Control, ...]]]:
    """Parts (first step, step after the last, who speaks) of a run of `steps`, in order."""
    speaking = [
        tuple(index for index, control in enumerate(controls) if _speaks(control, step, steps)) for step in range(steps)
    ]
    starts = [step for step in range(steps) if step == 0 or speaking[step] != speaking[step - 1]]
    return [
        (first, stop, tuple(controls[index] for index in speaking[first]))
        for first, stop in zip(starts, [*starts[1:], steps], strict=True)
    ]


def rows(controls: Sequence[Control], batch: int) -> list[dict[str, Tensor]]:
    """The tensors of each control, one row for each sample of a batch, so that guidance can join and split them."""
    return [
        {
            "image_latents": _repeated("pictures", control.image_latents, batch),
            "scale": _repeated("scales", _scale_row(control), batch),
        }
        for control in controls
    ]


def modulations(controls: Sequence[Control], t: Tensor, pooled: Tensor) -> list[Tree]:
    """`controlnet.modulations` of each, with the pooled text that it was trained on."""
    return [
        controlnet.modulations(control.params, control.config, t, _pooled(control, pooled)) for control in controls
    ]


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
    """The residuals of all controls together, for a transformer (`params`, `config`) at `latents`.

    latents, t, context, pooled: as in `mmdit.apply`. modulations: what `modulations` returned. Start and end are not
    looked at: they belong to a run (`segments`). The sum of what each gives, whatever their numbers of blocks.
    """
    given = modulations or [None] * len(controls)
    spoken = []
    for control, modulation in zip(controls, given, strict=True):
        if control.image_latents.shape[-2:] != latents.shape[-2:]:
            found, wanted = (" x ".join(map(str, x.shape[-2:])) for x in (control.image_latents, latents))
            raise ValueError(f"a ControlNet's picture has latents of {found}, but what is drawn has {wanted}")
        seen = latents
        if not control.config.own_patches:
            seen = mmdit.embed_image(params, config, latents.to(params["patch"]["weight"].dtype))
        spoken.append(
            controlnet.apply(
                control.params,
                control.config,
                seen,
                t,
                context,
                _pooled(control, pooled),
                control.image_latents,
                control.scale,
                modulations=modulation,
                **options,
            )
        )
    return combine(spoken, [control.after_last for control in controls], config.depth)


def combine(spoken: Sequence[Sequence[Tensor]], after_last: Sequence[bool], depth: int) -> Residuals:
    """Several lists of residuals as one: what `mmdit.apply` adds is the sum of what it would add of each."""
    if not spoken:
        return Residuals((), False)
    if len({len(part) for part in spoken}) == 1 and len(set(after_last)) == 1:
        return Residuals([_sum(parts) for parts in zip(*spoken, strict=True)], after_last[0])
    # One for each block; after the last, of those only that speak there.
    blocks = []
    for block in range(depth):
        heard = [
            part[mmdit.residual_index(block, depth, len(part))]
            for part, last in zip(spoken, after_last, strict=True)
            if last or block < depth - 1
        ]
        blocks.append(_sum(heard) if heard else torch.zeros_like(spoken[0][0]))
    return Residuals(blocks, any(after_last))


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _speaks(control: Control, step: int, steps: int) -> bool:
    return control.start <= step / steps and (step + 1) / steps <= control.end


def _pooled(control: Control, pooled: Tensor) -> Tensor:
    return torch.zeros_like(pooled) if control.config.zero_pooled else pooled


def _scale_row(control: Control) -> Tensor:
    like = control.image_latents
    if not isinstance(control.scale, Tensor):
        return torch.full((1,), float(control.scale), device=like.device, dtype=torch.float32)
    return control.scale.reshape(1) if control.scale.ndim == 0 else control.scale


def _repeated(name: str, x: Tensor, batch: int) -> Tensor:
    if x.shape[0] not in (1, batch):
        raise ValueError(f"{x.shape[0]} {name} of a ControlNet for {batch} samples; give one, or one for each")
    return x.expand(batch, *x.shape[1:])
