"""Whole parameters of one block from the parts of all processes: `sharding.materialize`."""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Params
from functional_sd3.parallel import collectives, transport
from functional_sd3.parallel.mesh import Mesh
from functional_sd3.parallel.placement import AXIS, Layout, Placement


def materialize(
    layout: Layout, mesh: Mesh, *, dtype: torch.dtype | None = None, reduce: torch.dtype = torch.float32
) -> Callable[[Params], Params]:
    """The function from one block's shards, or those of all that is in no block, to its whole parameters.

    For `materialize=` of `mmdit.apply` and the other networks: leaves of one block are sent together. The gradient of
    a sharded leaf is summed over "fsdp", in the order of the processes; that of a whole leaf is each process's own
    (`sum_gradients`). dtype: in which 16- and 32-bit floats are sent and returned, None for their own; cotangents are
    then sent in it too, and added in `reduce` at least. Leaves that the layout does not have, such as those of a LoRA,
    stay as they are. Raises ValueError for a leaf of another shape than its part.
    """
    return _Gather(_by_relative_path(layout, mesh), mesh.group(AXIS), dtype, reduce)


# With slots, since transforms look for tensors in the attributes of what is called (`core.closures`): here are none.
@dataclass(frozen=True, slots=True)
class _Gather:
    """`materialize`. placements: path within a block -> shape of the part -> placement."""

    placements: "Placements"
    group: transport.Group
    dtype: torch.dtype | None
    reduce: torch.dtype

    def __call__(self, params: Params) -> Params:
        flat = tree.flatten_paths(params)
        sharded: dict[tuple[torch.dtype, torch.dtype], dict[str, int]] = defaultdict(dict)
        gathered: dict[str, Tensor] = {}
        for path, leaf in flat.items():
            target = self.dtype if self.dtype and leaf.is_floating_point() and leaf.element_size() > 1 else leaf.dtype
            dim = _dim(self.placements, path, leaf)
            if dim is None or self.group is None:
                gathered[path] = leaf.to(target)
            else:
                sharded[leaf.dtype, target][path] = dim
        for (_, target), dims in sharded.items():
            gathered |= self.together(flat, dims, target)
        return tree.map_with_path(lambda path, leaf: gathered[path], params)

    def together(self, flat: dict[str, Tensor], dims: dict[str, int], target: torch.dtype) -> dict[str, Tensor]:
        """Whole leaves from shards of one dtype, sent as one tensor."""
        moved = [flat[path].movedim(dim, 0) for path, dim in dims.items()]
        sent = torch.cat([leaf.reshape(-1) for leaf in moved])[None]
        received = collectives.all_gather(sent, self.group, 0, dtype=target, reduce=self.reduce)
        parts = received.split([leaf.numel() for leaf in moved], 1)
        return {
            path: part.reshape(-1, *leaf.shape[1:]).movedim(0, dim)
            for (path, dim), leaf, part in zip(dims.items(), moved, parts, strict=True)
        }


_BLOCK = re.compile(r"^(?:.*\.)?blocks\.\d+\.")

Placements = dict[str, dict[tuple[int, ...], Placement]]


def _by_relative_path(layout: Layout, mesh: Mesh) -> Placements:
    """Path within its block -> shape of the part -> placement."""
    placements: Placements = defaultdict(dict)
    for path, placement in tree.flatten_paths(layout).items():
        known, shape = placements[_BLOCK.sub("", path)], placement.local_shape(mesh)
        if known.setdefault(shape, placement) != placement:
            raise ValueError(
                f"{path} has a part of shape {list(shape)}, as another block has at this path, but is divided otherwise"
            )
    return placements


def _dim(placements: Placements, path: str, leaf: Tensor) -> int | None:
    """The dimension along which a leaf is divided; None for one that is whole, or that the layout does not have."""
    known = placements.get(path)
    if known is None:
        return None
    if tuple(leaf.shape) not in known:
        shapes = " or ".join(str(list(shape)) for shape in known)
        raise ValueError(f"{path} has shape {list(leaf.shape)}; the part of this process has shape {shapes}")
    return known[tuple(leaf.shape)].dim
