"""Collectives in a graph of `torch.compile`, for gradients by autograd (`gradient="autograd"`).

PyTorch's functional collectives, which its compiler knows, in Functions of the form that it follows. They have no rules
for tangents and maps: outside of a compiled graph `collectives` are what has every derivative.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from functional_sd3.parallel.transport import Group, group_size, ordered_sum

functional: Any
try:
    # PyTorch has no public collectives that its compiler keeps in a graph and differentiates through.
    import torch.distributed._functional_collectives as functional
except ImportError:
    functional = None

is_available = functional is not None
"""True if this PyTorch has them; without, `--compile` on a mesh fails in the compiler, and all else works."""


def all_gather(x: Tensor, group: Group, dim: int, dtype: torch.dtype, reduce: torch.dtype) -> Tensor:
    """`collectives.all_gather` of equal parts."""
    return _AllGather.apply(x.movedim(dim, 0), group, reduce, dtype).movedim(0, dim)


def psum(x: Tensor, group: Group) -> Tensor:
    """`collectives.psum`."""
    return _Psum.apply(x, group)


def broadcast(x: Tensor, group: Group) -> Tensor:
    """`collectives.broadcast`."""
    return _Broadcast.apply(x, group)


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, reduce: torch.dtype, dtype: torch.dtype) -> Tensor:
        ctx.group, ctx.reduce, ctx.dtype = group, reduce, x.dtype
        return _gather(x.to(dtype), group)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        count = group_size(ctx.group)
        sizes = [cotangent.shape[0] // count] * count
        received = functional.all_to_all_single(cotangent.contiguous(), sizes, sizes, ctx.group)
        return ordered_sum(received.chunk(count), ctx.dtype, ctx.reduce), None, None, None


class _Psum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _total(x, group)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return cotangent, None


class _Broadcast(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return _total(cotangent, ctx.group), None


def _gather(x: Tensor, group: Group) -> Tensor:
    return functional.all_gather_tensor(x.contiguous(), 0, group)


def _total(x: Tensor, group: Group) -> Tensor:
    """The sum of the processes' tensors, in their order."""
    return ordered_sum(_gather(x[None], group).unbind(0), x.dtype)
