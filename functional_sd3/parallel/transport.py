"""Movement of tensors between the processes of a group: all-gather and all-to-all of any dtype, without derivatives.

Tensors are sent as bytes, so every dtype can be, also where a backend does not know it (float8 on gloo). Sums are taken
here in the order of the processes and not by the backend: the same bits on every backend, run and process.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any
"""A `torch.distributed.ProcessGroup`, or None: this process alone."""

_GATHERED_WHOLE = 1 << 16
"""Bytes up to which a sum is one all-gather, whose latency is half of that of an all-to-all with an all-gather."""


def group_size(group: Group) -> int:
    """Number of processes of a group."""
    return 1 if group is None else dist.get_world_size(group)


def group_index(group: Group) -> int:
    """Position of this process in a group."""
    return 0 if group is None else dist.get_rank(group)


def gather(x: Tensor, group: Group, dim: int, sizes: Sequence[int]) -> Tensor:
    """The processes' tensors joined along `dim`, where that of process i has size `sizes[i]`."""
    moved = x.movedim(dim, 0).contiguous()
    rest = moved.shape[1:]
    row = _numel(rest) * x.element_size()
    sent = _to_bytes(moved)
    if sent.numel() < max(sizes) * row:
        sent = torch.cat([sent, sent.new_zeros(max(sizes) * row - sent.numel())])
    received = sent.new_empty(len(sizes), max(sizes) * row)
    if sent.numel():
        _all_gather_into(received.view(-1), sent, group)
    if len(set(sizes)) == 1:
        whole = _from_bytes(received.view(-1), x.dtype, (sum(sizes), *rest))
    else:
        parts = [part[: size * row] for part, size in zip(received, sizes, strict=True)]
        whole = _from_bytes(torch.cat(parts), x.dtype, (sum(sizes), *rest))
    return whole.movedim(0, dim)


def exchange(flat: Tensor, counts: Sequence[int], group: Group, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """All-to-all: part i of flat (elements,), of `counts[i]` elements, goes to process i; what comes from process i has
    the shape `shapes[i]`."""
    width = flat.element_size()
    received_counts = [_numel(shape) * width for shape in shapes]
    sent = _to_bytes(flat)
    received = sent.new_empty(sum(received_counts))
    dist.all_to_all_single(received, sent, received_counts, [count * width for count in counts], group=group)
    parts = received.split(received_counts)
    return [_from_bytes(part, flat.dtype, shape) for part, shape in zip(parts, shapes, strict=True)]


def scatter(x: Tensor, group: Group, dim: int, sizes: Sequence[int]) -> list[Tensor]:
    """The parts along `dim`, of size `sizes[own index]`, of the tensors of all processes. No copy for dimension 0."""
    moved = x.movedim(dim, 0).contiguous()
    shape = (sizes[group_index(group)], *moved.shape[1:])
    counts = [size * _numel(shape[1:]) for size in sizes]
    return [part.movedim(0, dim) for part in exchange(moved.view(-1), counts, group, [shape] * len(sizes))]


def total(x: Tensor, group: Group) -> Tensor:
    """The sum of the processes' tensors, in their order: the same bits in every process."""
    count = group_size(group)
    if x.numel() * x.element_size() <= _GATHERED_WHOLE:
        return ordered_sum(gather(x[None], group, 0, [1] * count).unbind(0), x.dtype)
    flat = x.reshape(-1)
    size = -(-flat.numel() // count)
    if size * count != flat.numel():
        flat = torch.cat([flat, flat.new_zeros(size * count - flat.numel())])
    part = ordered_sum(exchange(flat.contiguous(), [size] * count, group, [(size,)] * count), x.dtype)
    return gather(part, group, 0, [size] * count)[: x.numel()].view(x.shape)


def ordered_sum(parts: Sequence[Tensor], dtype: torch.dtype, reduce: torch.dtype = torch.float32) -> Tensor:
    """((parts[0] + parts[1]) + ...), added in `reduce` if it is wider than the parts, and rounded once to `dtype`."""
    wide = parts[0].dtype
    if wide.is_floating_point:
        # Of float8 PyTorch knows neither sums nor what is wider.
        wide = reduce if wide.itemsize == 1 else torch.promote_types(wide, reduce)
    result = parts[0].to(wide, copy=len(parts) > 1)
    for part in parts[1:]:
        result += part.to(wide)
    return result.to(dtype)


def _to_bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def _from_bytes(data: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(tuple(shape))


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _all_gather_into(received: Tensor, sent: Tensor, group: Group) -> None:
    # torch 2.13 renamed it and warns of the old name.
    run = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    run(received, sent, group=group)
