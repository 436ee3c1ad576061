"""Pieces of a leaf: which indices of the whole a process has, who writes them, and how one division becomes another.

A checkpoint of one mesh is read on any other by these: what a process needs of a leaf is copied, range by range, from
the pieces that hold it.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.parallel.mesh import Mesh
from functional_sd3.parallel.placement import AXIS, Placement

Range = tuple[int, int]
"""Start and stop of indices along a dimension."""
Slices = tuple[slice, ...]


class Piece(NamedTuple):
    """Shape of a whole leaf, and of each divided dimension the ranges of it that lie one after the other in the piece.

    ranges: (dimension, ranges) in the order of the dimensions; () for the whole.
    """

    shape: tuple[int, ...]
    ranges: tuple[tuple[int, tuple[Range, ...]], ...] = ()

    def along(self, dim: int) -> tuple[Range, ...]:
        """The ranges along a dimension; the whole of one that is not divided."""
        return dict(self.ranges).get(dim, ((0, self.shape[dim]),))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the piece."""
        divided = dict(self.ranges)
        return tuple(_length(divided[dim]) if dim in divided else size for dim, size in enumerate(self.shape))


def piece(placement: Placement, mesh: Mesh) -> Piece:
    """This process's piece of a leaf: of its part along "tensor", the part along "fsdp"."""
    shape, divided = list(placement.shape), {}
    if placement.cut:
        count, index, (dim, matrices) = mesh.size("tensor"), mesh.index("tensor"), placement.cut
        shape[dim] *= count
        whole = shape[dim] // matrices
        starts = (matrix * whole + index * whole // count for matrix in range(matrices))
        divided[dim] = tuple((start, start + whole // count) for start in starts)
    if placement.dim is not None:
        own = placement.part(mesh)
        before = divided.get(own.dim, ((0, placement.shape[own.dim]),))
        divided[own.dim] = tuple(_within(before, own.start, own.start + own[own.dim]))
    return Piece(tuple(shape), tuple(sorted(divided.items())))


def writers(placements: Mapping[str, Placement], nbytes: Mapping[str, int], mesh: Mesh) -> dict[str, dict[Piece, int]]:
    """The pieces of every leaf, each with the rank of the process that writes it, the same on all processes.

    Of the processes that have a piece it is the one with the fewest bytes so far, the first of several. nbytes: of a
    process's part of each leaf.
    """
    ranks = [replace(mesh, rank=rank) for rank in range(mesh.size())]
    # Processes that differ in other axes have the same pieces.
    holders: dict[tuple[int, int], list[int]] = {}
    for each in ranks:
        holders.setdefault((each.index(AXIS), each.index("tensor")), []).append(each.rank)
    written = [0] * len(ranks)
    plan: dict[str, dict[Piece, int]] = {}
    for name, placement in placements.items():
        having: dict[Piece, list[int]] = {}
        for group in holders.values():
            having.setdefault(piece(placement, ranks[group[0]]), []).extend(group)
        plan[name] = {}
        for part, group in having.items():
            rank = min(group, key=lambda each: (written[each], each))
            written[rank] += nbytes[name]
            plan[name][part] = rank
    return plan


def cut(whole: Tensor, part: Piece) -> Tensor:
    """A copy of a piece of a whole leaf."""
    return assemble(part, [(whole, Piece(tuple(whole.shape)))])


def assemble(wanted: Piece, held: Iterable[tuple[Tensor, Piece]]) -> Tensor:
    """A piece from those that hold its indices, of which only these are read. Raises ValueError where some are in none.

    Pieces that overlap hold the same values.
    """
    missing = math.prod(wanted.local_shape)
    result = None
    for value, part in held:
        if part == wanted:
            return value.clone(memory_format=torch.contiguous_format)
        for target, source in overlaps(wanted, part):
            if result is None:
                result = value.new_empty(wanted.local_shape)
            result[target] = value[source]
            missing -= result[target].numel()
    if result is None or missing > 0:
        raise ValueError(f"lacks {missing} of {math.prod(wanted.local_shape)} values")
    return result


def overlaps(wanted: Piece, held: Piece) -> Iterator[tuple[Slices, Slices]]:
    """Slices of a wanted piece and of a held one that are the same indices of the whole."""
    along = [list(_common(wanted.along(dim), held.along(dim))) for dim in range(len(wanted.shape))]
    for boxes in itertools.product(*along):
        yield tuple(target for target, _ in boxes), tuple(source for _, source in boxes)


def _common(wanted: Iterable[Range], held: Iterable[Range]) -> Iterator[tuple[slice, slice]]:
    held = list(held)
    place = 0
    for start, stop in wanted:
        other = 0
        for first, last in held:
            low, high = max(start, first), min(stop, last)
            if low < high:
                yield (
                    slice(place + low - start, place + high - start),
                    slice(other + low - first, other + high - first),
                )
            other += last - first
        place += stop - start


def _within(ranges: Iterable[Range], start: int, stop: int) -> Iterator[Range]:
    """The indices `start` to `stop` of ranges that lie one after the other."""
    place = 0
    for first, last in ranges:
        low, high = max(start, place), min(stop, place + last - first)
        if low < high:
            yield first + low - place, first + high - place
        place += last - first


def _length(ranges: Iterable[Range]) -> int:
    return sum(stop - start for start, stop in ranges)
