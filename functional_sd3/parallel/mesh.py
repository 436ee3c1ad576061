"""Mesh of processes: named axes, over which data, parameters, the sequence and heads are divided.

The axes are, from the outermost to the innermost: data (whole parameters, different rows of a batch), fsdp (parameters
sharded too), guidance (different conditionings of one image), sequence (different tokens of one image), tensor
(different heads and hidden units). Neighbouring ranks differ in the innermost axis, so that what communicates most
stays within a machine.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from functional_sd3.parallel.transport import Group

AXES = ("data", "fsdp", "guidance", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp")
"""The axes over which the rows of a batch are divided."""


@dataclass(frozen=True)
class Mesh:
    """Sizes of the named axes, this process's rank, and the process groups that it is in.

    `init` makes one. size(*axes), index(*axes) and group(*axes) of several axes are those of all their processes, in
    the order of the mesh: `index("data", "fsdp")` is the position of this process among those that divide a batch.
    """

    sizes: Mapping[str, int]
    rank: int = 0
    groups: Mapping[tuple[str, ...], Group] = field(default_factory=dict, repr=False)

    def size(self, *axes: str) -> int:
        """Number of processes along the axes, all of them by default."""
        return math.prod(self.sizes[axis] for axis in _ordered(axes))

    def index(self, *axes: str) -> int:
        """Position of this process along the axes, in [0, size)."""
        coordinates = _coordinates(self.sizes, self.rank)
        position = 0
        for axis in _ordered(axes):
            position = position * self.sizes[axis] + coordinates[axis]
        return position

    def group(self, *axes: str) -> Group:
        """The process group along the axes, for `collectives`; None where it is this process alone.

        Raises ValueError for a combination of axes that has no group: single axes, data with fsdp, and all have one.
        """
        longer = tuple(axis for axis in _ordered(axes) if self.sizes[axis] > 1)
        if not longer:
            return None
        if longer not in self.groups:
            raise ValueError(f"this mesh has no group over {', '.join(longer)}; it has {list(self.groups)}")
        return self.groups[longer]


ONE_PROCESS = Mesh(dict.fromkeys(AXES, 1))
"""The mesh of a process that works alone."""


def init(sizes: Mapping[str, int] | None = None) -> Mesh:
    """The mesh of these sizes, axes left out having size 1; every process calls it, once a mesh.

    A mesh of one process needs no torch.distributed. Raises ValueError for unknown axes, sizes below 1, and where the
    sizes do not multiply to the number of processes.
    """
    sizes = dict(sizes or {})
    if unknown := sorted(sizes.keys() - set(AXES)):
        raise ValueError(f"mesh axes {unknown} must be among {', '.join(AXES)}")
    whole = {axis: sizes.get(axis, 1) for axis in AXES}
    if small := {axis: size for axis, size in whole.items() if size < 1}:
        raise ValueError(f"sizes {small} of a mesh must be at least 1")
    processes = dist.get_world_size() if _is_distributed() else 1
    if math.prod(whole.values()) != processes:
        raise ValueError(
            f"the mesh {describe(whole)} is for {math.prod(whole.values())} processes, but there "
            f"{'is' if processes == 1 else 'are'} {processes}"
        )
    if processes == 1:
        return Mesh(whole)
    groups: dict[tuple[str, ...], Group] = {}
    for axes in ((axis,) for axis in AXES), (BATCH_AXES, AXES):
        for combination in axes:
            longer = tuple(axis for axis in combination if whole[axis] > 1)
            if longer and longer not in groups:
                groups[longer] = _own_group(whole, longer)
    return Mesh(whole, dist.get_rank(), groups)


def own_rows(samples: Any, mesh: Mesh) -> Any:
    """This process's part of the samples of a batch. Raises ValueError where they do not divide."""
    count, index = mesh.size(*BATCH_AXES), mesh.index(*BATCH_AXES)
    if len(samples) % count:
        raise ValueError(f"a batch of {len(samples)} cannot be divided over {count} processes (data and fsdp)")
    size = len(samples) // count
    return samples[index * size : (index + 1) * size]


def parse(text: str, axes: Sequence[str] = AXES) -> dict[str, int]:
    """Sizes from "data=2,fsdp=4". Raises ValueError naming the part that is not axis=size of one of `axes`, or an axis
    given twice."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, size = (word.strip() for word in part.partition("="))
        if not equals or axis not in axes or not (size.isascii() and size.isdigit()) or int(size) < 1:
            raise ValueError(
                f"{part!r} in the mesh {text!r} must be axis=size, the axis one of {', '.join(axes)} and the size at "
                f"least 1: {axes[0]}=2,{axes[1]}=4"
            )
        if axis in sizes:
            raise ValueError(f"axis {axis} is twice in the mesh {text!r}")
        sizes[axis] = int(size)
    return sizes


def describe(sizes: Mapping[str, int]) -> str:
    """ "data=2,fsdp=4": the axes longer than 1, "data=1" if there is none."""
    longer = ",".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes.get(axis, 1) > 1)
    return longer or "data=1"


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _ordered(axes: Sequence[str]) -> Sequence[str]:
    if unknown := sorted(set(axes) - set(AXES)):
        raise ValueError(f"mesh axes {unknown} must be among {', '.join(AXES)}")
    return [axis for axis in AXES if axis in axes] if axes else AXES


def _coordinates(sizes: Mapping[str, int], rank: int) -> dict[str, int]:
    coordinates = {}
    for axis in reversed(AXES):
        rank, coordinates[axis] = divmod(rank, sizes[axis])
    return coordinates


def _own_group(sizes: Mapping[str, int], axes: tuple[str, ...]) -> Group:
    """The group of this process over `axes`. Every process makes all of them, as torch requires."""
    ranks = range(math.prod(sizes.values()))
    if all(sizes[axis] == 1 for axis in AXES if axis not in axes):
        return dist.group.WORLD
    own = None
    others = [axis for axis in AXES if axis not in axes]
    for fixed in itertools.product(*(range(sizes[axis]) for axis in others)):
        members = [rank for rank in ranks if tuple(_coordinates(sizes, rank)[axis] for axis in others) == tuple(fixed)]
        group = dist.new_group(members)
        own = group if dist.get_rank() in members else own
    return own
