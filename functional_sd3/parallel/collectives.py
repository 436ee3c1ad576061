"""Collectives that every transform of torch.func understands: sums and movements of tensors between processes.

torch's own are silently wrong under transforms. Each of these is a linear function of the tensors of all processes,
whose transpose, tangent and batching rule are such collectives again, so grad, jvp, vmap and any nesting of them
work across processes. All processes of a group call the same ones in the same order.

A gradient is that of the sum of the processes' losses: with data or a sequence divided over processes, each one
differentiates its own part of the loss, divided by the global count. `psum` is different by convention: its result is
the same everywhere and so is its cotangent, which is passed on as it is; where a value that is the same everywhere
enters what differs by process, `broadcast` sums the cotangents.

group: a `torch.distributed.ProcessGroup` (`Mesh.group`), or None for this process alone, where each is the identity.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from functional_sd3.parallel import traced, transport
from functional_sd3.parallel.transport import Group, group_index, group_size

Sizes = Sequence[int] | None


def all_gather(
    x: Tensor,
    group: Group,
    dim: int = 0,
    *,
    sizes: Sizes = None,
    dtype: torch.dtype | None = None,
    reduce: torch.dtype = torch.float32,
) -> Tensor:
    """The processes' tensors joined along `dim`, in the order of the group; its transpose is `reduce_scatter`.

    x (..., own size, ...) -> (..., sum of the sizes, ...).

    sizes: of `dim` on each process, where they differ. dtype: what is sent and returned, such as bfloat16 for float32
    parameters; cotangents, sent in their own dtype, are added in the dtype `reduce` at least and returned in that of x.
    Any dtype, bool included.
    """
    dim, sizes = _dim(x, dim), _own_sizes(x, group, dim, sizes)
    dtype = dtype or x.dtype
    if group_size(group) == 1:
        return x.to(dtype)
    if _is_compiled() and len(set(sizes)) == 1:
        return traced.all_gather(x, group, dim, dtype, reduce)
    return _AllGather.apply(x, group, dim, sizes, reduce, dtype)


def reduce_scatter(
    x: Tensor,
    group: Group,
    dim: int = 0,
    *,
    sizes: Sizes = None,
    dtype: torch.dtype | None = None,
    reduce: torch.dtype = torch.float32,
) -> Tensor:
    """This process's part along `dim` of the sum of the processes' tensors; its transpose is `all_gather`.

    x (..., size, ...), of one shape on all processes -> (..., own part, ...).

    sizes: of the parts, where they are not equal. dtype: of the result. Added in the order of the processes, in the
    dtype `reduce` at least. Raises ValueError for bool tensors, and where `dim` does not divide.
    """
    _check_summed(x)
    dim = _dim(x, dim)
    sizes, dtype = _part_sizes(x, group, dim, sizes), dtype or x.dtype
    return x.to(dtype) if group_size(group) == 1 else _ReduceScatter.apply(x, group, dim, sizes, reduce, dtype)


def all_to_all(
    x: Tensor, group: Group, split: int, join: int, *, split_sizes: Sizes = None, join_sizes: Sizes = None
) -> Tensor:
    """Dimension `split` divided over the processes, in exchange for `join`, which is put together.

    Process j keeps part j of `split` of every process's tensor, joined along `join` in the order of the processes. Its
    transpose is itself with split and join swapped. split_sizes: of the parts, where they are not equal; join_sizes: of
    `join` on each process, where they differ. Any dtype. Raises ValueError where `split` does not divide, and for
    uneven sizes of one dimension that is both.
    """
    split, join = _dim(x, split), _dim(x, join)
    if split == join and (split_sizes or join_sizes):
        raise ValueError(f"split and join are both dimension {split}: its parts must be equal, without sizes")
    splits, joins = _part_sizes(x, group, split, split_sizes), _own_sizes(x, group, join, join_sizes)
    return x if group_size(group) == 1 else _AllToAll.apply(x, group, split, join, splits, joins)


def psum(x: Tensor, group: Group) -> Tensor:
    """The sum of the processes' tensors, of one shape, on all of them; its transpose is `broadcast`.

    Summed in the order of the processes, in at least float32: the same bits everywhere. Raises ValueError for bool.
    """
    _check_summed(x)
    if group_size(group) == 1:
        return x
    return traced.psum(x, group) if _is_compiled() else _Psum.apply(x, group)


def broadcast(x: Tensor, group: Group) -> Tensor:
    """x, which is the same on all processes, as the input of what differs by process: the transpose of `psum`.

    Nothing is sent; cotangents are summed. For the values of one process use `broadcast_from`.
    """
    if group_size(group) == 1:
        return x
    return traced.broadcast(x, group) if _is_compiled() else _Broadcast.apply(x, group)


def broadcast_from(x: Tensor, group: Group, source: int = 0) -> Tensor:
    """The tensor of process `source` of the group on all of them; all have its shape and dtype. No derivative."""
    count = group_size(group)
    if count == 1:
        return x
    is_source = group_index(group) == source
    sizes = [int(index == source) for index in range(count)]
    return transport.gather(x.detach()[None] if is_source else x.detach()[None][:0], group, 0, sizes)[0]


class _Converted(Function):
    """A collective whose last argument is the dtype of what it returns; its transpose returns that of its input."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *ctx.options, ctx.dtype = inputs
        ctx.source_dtype = x.dtype
        ctx.save_for_forward(x)


class _AllGather(_Converted):
    @staticmethod
    def forward(
        x: Tensor, group: Group, dim: int, sizes: tuple[int, ...], reduce: torch.dtype, dtype: torch.dtype
    ) -> Tensor:
        return transport.gather(x.to(dtype), group, dim, sizes)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return _ReduceScatter.apply(cotangent, *ctx.options, ctx.source_dtype), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Any:
        return _AllGather.apply(_mapped_like(tangent, ctx), *ctx.options, ctx.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, group: Group, dim: int, *options: Any) -> Any:
        return _AllGather.apply(x.movedim(in_dims[0], 0), group, dim + 1, *options), 0


class _ReduceScatter(_Converted):
    @staticmethod
    def forward(
        x: Tensor, group: Group, dim: int, sizes: tuple[int, ...], reduce: torch.dtype, dtype: torch.dtype
    ) -> Tensor:
        return transport.ordered_sum(transport.scatter(x, group, dim, sizes), dtype, reduce)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return _AllGather.apply(cotangent, *ctx.options, ctx.source_dtype), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Any:
        return _ReduceScatter.apply(_mapped_like(tangent, ctx), *ctx.options, ctx.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, group: Group, dim: int, *options: Any) -> Any:
        return _ReduceScatter.apply(x.movedim(in_dims[0], 0), group, dim + 1, *options), 0


class _AllToAll(Function):
    @staticmethod
    def forward(
        x: Tensor, group: Group, split: int, join: int, splits: tuple[int, ...], joins: tuple[int, ...]
    ) -> Tensor:
        parts = x.split(list(splits), split)
        shape = parts[group_index(group)].shape
        # Of one dimension that is both, the parts are equal.
        shapes = [(*shape[:join], size if join != split else shape[join], *shape[join + 1 :]) for size in joins]
        flat, counts = torch.cat([part.reshape(-1) for part in parts]), [part.numel() for part in parts]
        return torch.cat(transport.exchange(flat, counts, group, shapes), join)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.group, ctx.split, ctx.join, ctx.splits, ctx.joins = inputs
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        options = (ctx.join, ctx.split, ctx.joins, ctx.splits) if ctx.split != ctx.join else _same(ctx)
        return _AllToAll.apply(cotangent, ctx.group, *options), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Any:
        return _AllToAll.apply(_mapped_like(tangent, ctx), ctx.group, ctx.split, ctx.join, ctx.splits, ctx.joins)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, group: Group, split: int, join: int, *options: Any) -> Any:
        return _AllToAll.apply(x.movedim(in_dims[0], 0), group, split + 1, join + 1, *options), 0


def _same(ctx: Any) -> tuple[Any, ...]:
    return ctx.split, ctx.join, ctx.splits, ctx.joins


class _Psum(Function):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        return transport.total(x, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.group = inputs
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return _Broadcast.apply(cotangent, ctx.group), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Any:
        return _Psum.apply(_mapped_like(tangent, ctx), ctx.group)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, group: Group) -> Any:
        return _Psum.apply(x, group), in_dims[0]


class _Broadcast(Function):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.group = inputs
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return _Psum.apply(cotangent, ctx.group), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Any:
        return _Broadcast.apply(_mapped_like(tangent, ctx), ctx.group)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, group: Group) -> Any:
        return _Broadcast.apply(x, group), in_dims[0]


def _mapped_like(tangent: Tensor, ctx: Any) -> Tensor:
    """The tangent, mapped where its primal is.

    Under vmap PyTorch maps an unmapped tangent of a mapped primal or not, by their offsets in memory, which differ by
    process (2.13); the collective of the tangent would have another shape on each.
    """
    (x,) = ctx.saved_tensors
    return tangent + (x[(slice(0, 0),) * x.ndim].sum() if x.ndim else torch.zeros_like(x)).to(tangent.dtype)


def _is_compiled() -> bool:
    return torch.compiler.is_compiling() and traced.is_available


def _dim(x: Tensor, dim: int) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dimension {dim} of a tensor of shape {tuple(x.shape)}")
    return dim % x.ndim


def _own_sizes(x: Tensor, group: Group, dim: int, sizes: Sizes) -> tuple[int, ...]:
    """Sizes of `dim` on each process, of which this one's must be that of x."""
    count = group_size(group)
    sizes = (x.shape[dim],) * count if sizes is None else tuple(sizes)
    if len(sizes) != count or sizes[group_index(group)] != x.shape[dim]:
        raise ValueError(
            f"sizes {sizes} of dimension {dim} on {count} processes, of which process {group_index(group)} has "
            f"{x.shape[dim]}"
        )
    return sizes


def _part_sizes(x: Tensor, group: Group, dim: int, sizes: Sizes) -> tuple[int, ...]:
    """Sizes of the parts of `dim`, which add up to that of x."""
    count, size = group_size(group), x.shape[dim]
    if sizes is None:
        if size % count:
            raise ValueError(f"dimension {dim} of size {size} does not divide over {count} processes: give the sizes")
        return (size // count,) * count
    if len(sizes) != count or sum(sizes) != size:
        raise ValueError(f"sizes {tuple(sizes)} do not divide dimension {dim} of size {size} over {count} processes")
    return tuple(sizes)


def _check_summed(x: Tensor) -> None:
    if x.dtype == torch.bool:
        raise ValueError("a sum of bool tensors over processes: convert them to an integer or float dtype first")
