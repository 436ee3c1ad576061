"""Mixtures of two tensors: along the arc between vectors, and where tiles overlap."""

import torch
from torch import Tensor


def slerp(start: Tensor, end: Tensor, amount: float | Tensor) -> Tensor:
    """Spherical interpolation between vectors: (batch, ...), each sample one vector; amount () or (batch,).

    sin((1 - a) w) / sin(w) start + sin(a w) / sin(w) end with w the angle between them (Shoemake 1985, "Animating
    rotation with quaternion curves"). Between two Gaussian noises it is one, where the chord has too little variance.
    Parallel, opposed and zero vectors, which have no arc, are mixed along the chord, where equal vectors stay equal.
    Computed in float32 at least: in float16 the square of the length of 65,504 normal numbers overflows.
    """
    dtype = start.dtype
    start, end = (side.to(torch.promote_types(side.dtype, torch.float32)) for side in (start, end))
    amount = torch.as_tensor(amount, dtype=start.dtype, device=start.device)
    amount = amount.reshape(amount.shape + (1,) * (start.ndim - 1)) if amount.ndim else amount
    axes = tuple(range(1, start.ndim))
    squares = start.square().sum(axes, keepdim=True) * end.square().sum(axes, keepdim=True)
    cosine = (start * end).sum(axes, keepdim=True) / squares.sqrt().clamp_min(torch.finfo(start.dtype).tiny)
    has_arc = (cosine.abs() < 1 - 1e-6) & (squares > 0)
    # Without an arc the angle is replaced by a constant, so that derivatives are finite too.
    angle = torch.acos(torch.where(has_arc, cosine, 0.0))
    sine = torch.sin(angle)
    arc = torch.sin((1 - amount) * angle) / sine * start + torch.sin(amount * angle) / sine * end
    return torch.where(has_arc, arc, torch.lerp(start, end, amount)).to(dtype)


def ramp(length: int, overlap: int, *, rises: bool, falls: bool, like: Tensor) -> Tensor:
    """Weights of a tile along one side, (length,): linear over the overlap with another tile, else 1.

    like: a tensor of the dtype and device of the result.
    """
    slope = (torch.arange(length, device=like.device, dtype=like.dtype) + 1) / (min(overlap, length) + 1)
    flat = torch.ones_like(slope)
    return torch.minimum(slope if rises else flat, slope.flip(0) if falls else flat).clamp_max(1)
