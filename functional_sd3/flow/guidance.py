"""Guidance as functions from velocities to a velocity, so that they compose.

Scales are Python numbers, or tensors of shape () or (batch,): differentiable, one for each sample if need be. What is
combined is combined in float32, whatever dtype the network answers in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from functional_sd3.core.types import Tree, Velocity
from functional_sd3.flow.path import broadcast

Scale = float | Tensor


def classifier_free(velocity: Velocity, uncond_velocity: Velocity, scale: Scale) -> Velocity:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): v_u + scale (v_c - v_u).

    scale 1 is the conditional velocity, 0 the unconditional, more than 1 goes beyond the condition; Python's 1 costs no
    unconditional evaluation. For one evaluation of a batch of both see `batched`.
    """
    if _is_one(scale):
        return velocity

    def guided(x: Tensor, t: Tensor) -> Tensor:
        return extrapolate(uncond_velocity(x, t), velocity(x, t), scale)

    return guided


def batched(
    fn: Callable[..., Tensor], uncond_args: tuple[Tree, ...], cond_args: tuple[Tree, ...], scale: Scale
) -> Velocity:
    """`classifier_free` of `fn(x, t, *args)` in one evaluation, of the batch [unconditional, conditional].

    args: trees of tensors whose first dimension is the batch (context, pooled), the same structure in both; they are
    joined here, once for a whole run. fn sees x (2 batch, ...), t () or (2 batch,). Python's scale 1 evaluates the
    conditional half alone.
    """
    if _is_one(scale):
        return lambda x, t: fn(x, t, *cond_args)
    both = pytree.tree_map(lambda uncond, cond: torch.cat([uncond, cond]), tuple(uncond_args), tuple(cond_args))

    def guided(x: Tensor, t: Tensor) -> Tensor:
        answer = fn(torch.cat([x, x]), torch.cat([t, t]) if t.ndim else t, *both)
        uncond, cond = answer.chunk(2)
        return extrapolate(uncond, cond, scale)

    return guided


def extrapolate(start: Tensor, end: Tensor, scale: Scale) -> Tensor:
    """start + scale (end - start), in float32 or wider."""
    working = torch.promote_types(start.dtype, torch.float32)
    start, end = start.to(working), end.to(working)
    return start + broadcast(scale, start) * (end - start)


def _is_one(scale: Any) -> bool:
    return not isinstance(scale, Tensor) and scale == 1
