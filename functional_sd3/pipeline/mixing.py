"""Interpolation between noises, and between the embeddings of prompts."""

from collections.abc import Callable

import torch
from torch import Tensor

from functional_sd3.core.blend import slerp
from functional_sd3.flow.path import broadcast
from functional_sd3.pipeline.fields import Conditions, slice_batch
from functional_sd3.text.conditioning import Conditioning

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(start, end, amount () or (batch,)) -> start for 0, end for 1; tensors (batch, ...)."""


def lerp(start: Tensor, end: Tensor, amount: float | Tensor) -> Tensor:
    """start + amount (end - start), and `end` itself for 1; computed in float32 at least, in the dtype of `start`."""
    dtype = torch.promote_types(start.dtype, torch.float32)
    amount = broadcast(torch.as_tensor(amount, dtype=dtype, device=start.device), start)
    return ((1 - amount) * start + amount * end).to(start.dtype)


def mix_conditions(start: Conditions, end: Conditions, amount: float | Tensor, mix: Mix = lerp) -> Conditions:
    """Conditioning between two prompts (and their negative prompts): each token's vector and the pooled one mixed.

    `slerp` mixes each vector's direction. amount () or (batch,).
    """

    def vectors(first: Tensor, second: Tensor) -> Tensor:
        if first.shape[1:] != second.shape[1:]:
            raise ValueError(f"prompts of {first.shape[1]} and {second.shape[1]} tokens cannot be mixed")
        each = torch.as_tensor(amount, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)
        if first.ndim == 3 and each.ndim:
            each = each.repeat_interleave(first.shape[1])
        width = first.shape[-1]
        return mix(first.reshape(-1, width), second.reshape(-1, width), each).reshape(first.shape)

    return Conditions(
        *(
            Conditioning(*(vectors(first, second) for first, second in zip(one, other, strict=True)))
            for one, other in zip(start, end, strict=True)
        )
    )


def between(noises: Tensor, conditions: Conditions, places: Tensor, mix: Mix = lerp) -> tuple[Tensor, Conditions]:
    """Noise and conditions at places (n,) from 0 to stops - 1: (n, ...) from (stops, ...)."""
    first = places.detach().floor().long().clamp(0, len(noises) - 2)
    amount = places - first
    noise = slerp(noises[first], noises[first + 1], amount)
    return noise, mix_conditions(slice_batch(conditions, first), slice_batch(conditions, first + 1), amount, mix)
