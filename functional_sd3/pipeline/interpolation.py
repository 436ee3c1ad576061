"""Between noises and between prompts: pictures near a picture, and pictures on the way from one to another."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core.types import Key, Params
from functional_sd3.flow.path import broadcast
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.fields import Conditions, rows
from functional_sd3.pipeline.image_to_image import divided
from functional_sd3.pipeline.latents import decode, initial_noise, sample_keys
from functional_sd3.pipeline.sampling import sample
from functional_sd3.pipeline.text_to_image import encode
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.weights.model import Tokenizers

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(start, end, amount () or (batch,)) -> start for 0, end for 1; tensors (batch, ...)."""


def lerp(start: Tensor, end: Tensor, amount: float | Tensor) -> Tensor:
    """start + amount (end - start), and `end` itself for 1."""
    amount = broadcast(torch.as_tensor(amount, dtype=start.dtype, device=start.device), start)
    return (1 - amount) * start + amount * end


def slerp(start: Tensor, end: Tensor, amount: float | Tensor) -> Tensor:
    """Along the arc between vectors: (batch, ...), each sample one vector; amount () or (batch,).

    sin((1 - a) w) / sin(w) start + sin(a w) / sin(w) end with w the angle between them (Shoemake 1985). Between two
    Gaussian noises it is one, where `lerp` has too little variance. Parallel and opposed vectors, which have no arc,
    are mixed as `lerp` does.
    """
    amount = broadcast(torch.as_tensor(amount, dtype=start.dtype, device=start.device), start)
    axes = tuple(range(1, start.ndim))
    cosine = (start * end).sum(axes, keepdim=True) / (
        start.square().sum(axes, keepdim=True) * end.square().sum(axes, keepdim=True)
    ).sqrt().clamp_min(torch.finfo(start.dtype).tiny)
    has_arc = cosine.abs() < 1 - 1e-6
    # Where there is none the angle is a harmless number, so that derivatives are finite too.
    angle = torch.acos(torch.where(has_arc, cosine, 0.0))
    first = torch.where(has_arc, torch.sin((1 - amount) * angle) / torch.sin(angle), 1 - amount)
    second = torch.where(has_arc, torch.sin(amount * angle) / torch.sin(angle), amount + torch.zeros_like(angle))
    return first * start + second * end


def mix_conditions(start: Conditions, end: Conditions, amount: float | Tensor, mix: Mix = lerp) -> Conditions:
    """Between two prompts, and what is guided away from with each: every token's vector, and the pooled one, mixed.

    `slerp` mixes each vector's direction. amount () or (batch,).
    """

    def vectors(first: Tensor, second: Tensor) -> Tensor:
        if first.shape[1:] != second.shape[1:]:
            raise ValueError(f"prompts of {first.shape[1]} and {second.shape[1]} tokens cannot be mixed")
        each = torch.as_tensor(amount, dtype=first.dtype, device=first.device)
        if first.ndim == 3 and each.ndim:
            each = each.repeat_interleave(first.shape[1])
        flat = (part.reshape(-1, part.shape[-1]) for part in (first, second))
        return mix(*flat, each).reshape(first.shape)

    return Conditions(
        *(
            Conditioning(*(vectors(first, second) for first, second in zip(one, other, strict=True)))
            for one, other in zip(start, end, strict=True)
        )
    )


def variations(
    params: Params,
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    key: Key,
    *,
    towards: Key,
    amount: float | Tensor = 0.2,
    height: int | None = None,
    width: int | None = None,
    **options: Any,
) -> Tensor:
    """Pictures near those of a key: (batch, 3, height, width) in [0, 1], float32.

    The noise lies on the arc (`slerp`) from that of `key` to that of `towards`, both as of `generate`: amount 0 gives
    the pictures of the one, 1 of the other; () or (batch,). options: of `generate`. One prompt serves all keys.
    """
    words, run = divided(options)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    count = max(len(prompts), *(len(each) for each in (key, towards) if each.ndim > 1), 1)
    prompts = prompts * count if len(prompts) == 1 else prompts
    device = params["transformer"]["patch"]["weight"].device
    near, far = (initial_noise(each, config, len(prompts), height, width, device=device) for each in (key, towards))
    conditions = encode(params, config, tokenizers, prompts, **words)
    return decode(params, config, sample(params, config, conditions, slerp(near, far, amount), key=key, **run))


def interpolate(
    params: Params,
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    keys: Key,
    *,
    frames: int = 8,
    mix: Mix = lerp,
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    **options: Any,
) -> Tensor:
    """Pictures on the way from prompt to prompt, or seed to seed, or both: (frames, 3, height, width) in [0, 1].

    prompts, keys (2,) or (stops, 2): the stops, evenly far apart, the first and the last of them the first and the last
    frame; a single prompt, or a single key, stays the same throughout. Noise is mixed by `slerp`, embeddings by `mix`:
    `lerp` or `slerp`. batch: frames drawn at once, by default all. What a frame is drawn from is a function of its
    place, which can be differentiated and vmapped: `between`.
    """
    words, run = divided(options)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    count = max(len(prompts), len(keys) if keys.ndim > 1 else 1)
    if frames < 2 or count < 2:
        raise ValueError(f"{frames} frames between {count} stops; both must be at least 2")
    if {len(prompts), len(keys) if keys.ndim > 1 else 1} - {1, count}:
        raise ValueError(f"{len(keys)} keys for {len(prompts)} prompts; give one, or one for each")
    keys = (keys if keys.ndim > 1 else sample_keys(keys, 1)).expand(count, 2)
    device = params["transformer"]["patch"]["weight"].device
    noises = initial_noise(keys, config, count, height, width, device=device)
    conditions = encode(params, config, tokenizers, prompts * (count // len(prompts)), **words)
    places = torch.linspace(0, count - 1, frames, device=device, dtype=torch.float32)
    drawn = []
    for part in places.split(batch or frames):
        noise, told = between(noises, conditions, part, mix)
        # A method's own noise is that of the first stop in every frame, so that they go on smoothly.
        steady = keys[:1].expand(len(part), 2)
        drawn.append(decode(params, config, sample(params, config, told, noise, key=steady, **run)))
    return torch.cat(drawn)


def between(noises: Tensor, conditions: Conditions, places: Tensor, mix: Mix = lerp) -> tuple[Tensor, Conditions]:
    """Noise and conditions at places (n,) from 0 to stops - 1: (n, ...) from (stops, ...)."""
    first = places.detach().floor().long().clamp(0, len(noises) - 2)
    amount = places - first
    noise = slerp(noises[first], noises[first + 1], amount)
    return noise, mix_conditions(rows(conditions, first), rows(conditions, first + 1), amount, mix)
