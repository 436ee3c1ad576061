"""Parameters sharded over the mesh axis "fsdp": layouts, shards, gathered blocks, gradients and their norm.

Zhao et al. 2023, "PyTorch FSDP: experiences on scaling fully sharded data parallel" (arXiv:2304.11277), as functions of
trees of plain tensors: each process has a part of every parameter, of its moments and averages, and gathers one block's
parameters at a time, inside the function that is rematerialised, so that the backward pass gathers them again. With
the axis "data" longer than 1 too it is their hybrid sharding (HSDP).

    layout = sharding.layout(spec, mesh)
    params = sharding.init(key, spec, layout, mesh)
    gather = sharding.materialize(layout, mesh)
    velocity = mmdit.apply(params, config, x, t, context, pooled, materialize=gather, block_transform=transform.remat)
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from functional_sd3.core import leafwise, prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.rounding import Positions
from functional_sd3.core.spec import Elementwise, Param
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.parallel import collectives, transport
from functional_sd3.parallel.gathering import materialize
from functional_sd3.parallel.mesh import BATCH_AXES, Mesh
from functional_sd3.parallel.placement import AXIS, Layout, Placement, is_sharded
from functional_sd3.parallel.tensor import cut_of, join_leaf, own_leaf

__all__ = [
    "Layout",
    "Placement",
    "init",
    "layout",
    "materialize",
    "mean",
    "norm",
    "positions",
    "shard",
    "shard_known",
    "state_layout",
    "sum_gradient",
    "sum_gradients",
    "whole",
]


def layout(spec: Tree, mesh: Mesh, rules: Mapping[str, str] | None = None, *, is_cut: bool = True) -> Layout:
    """Placement of each leaf of a spec: divided by the rules, else along its first axis that divides, else nowhere.

    rules: logical axis (`spec.AXES`) -> mesh axis, which is "fsdp": along which axis leaves that have it are divided
    first. With an axis "tensor" the spec is that of this process's part (`tensor.part_spec`); is_cut: False for what is
    whole along that axis, as text encoders are. Raises ValueError for another mesh axis.
    """
    rules = dict(rules or {})
    if others := sorted(set(rules.values()) - {AXIS}):
        raise ValueError(f"rules divide parameters over {others}; a layout divides them over {AXIS!r} alone")
    count, is_cut = mesh.size(AXIS), is_cut and mesh.size("tensor") > 1

    def place(path: str, param: Param) -> Placement:
        fitting = [dim for dim, size in enumerate(param.shape) if size % count == 0 and size >= count]
        preferred = [dim for dim in fitting if param.axes[dim] in rules]
        dim = next(iter(preferred or fitting), None) if count > 1 else None
        return Placement(param.shape, dim, cut_of(param) if is_cut else None)

    return specs.map_params(place, spec)


def shard(params: Tree, layout: Layout, mesh: Mesh) -> Tree:
    """This process's part of whole parameters, over "tensor" and "fsdp": copies, so that the whole can be freed."""

    def own(path: str, leaf: Tensor, placement: Placement) -> Tensor:
        part = leaf if placement.cut is None else own_leaf(path, leaf, placement.cut, mesh)
        return _own(part, placement, mesh)

    return tree.map_with_path(own, params, layout)


def shard_known(params: Tree, layout: Layout, mesh: Mesh) -> Tree:
    """Parts over "fsdp" of parameters that are parts over "tensor" already (`tensor.cut`). Leaves that the layout does
    not have, such as the scales of weights in int8, stay as they are."""
    placements = tree.flatten_paths(layout)
    return tree.map_with_path(
        lambda path, leaf: _own(leaf, placements[path], mesh) if path in placements else leaf, params
    )


def whole(params: Tree, layout: Layout, mesh: Mesh) -> Tree:
    """The whole parameters, on every process; all of them call it."""
    group = mesh.group(AXIS)

    def join(leaf: Tensor, placement: Placement) -> Tensor:
        part = leaf if placement.dim is None else collectives.all_gather(leaf, group, placement.dim)
        return part if placement.cut is None else join_leaf(part, placement.cut, mesh)

    return tree.map(join, params, layout)


def init(
    key: Key,
    spec: Tree,
    layout: Layout,
    mesh: Mesh,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Params:
    """This process's part of `spec.init(key, spec)`, bit for bit.

    Only this part is drawn, since a draw's element i depends on the key and i alone; leaves whose initialiser is no
    `spec.Elementwise` are made whole, one at a time, and cut.
    """
    keys = specs.leaf_keys(key.to(device), spec)
    placements = tree.flatten_paths(layout)

    def draw(path: str, param: Param) -> Tensor:
        placement = placements[path]
        if placement.dim is not None and isinstance(param.init, Elementwise):
            return param.init(keys[path], placement.part(mesh)).to(dtype)
        return _own(param.init(keys[path], param.shape).to(dtype), placement, mesh)

    return specs.map_params(draw, spec)


def sum_gradients(
    grads: Params, layout: Layout | None, mesh: Mesh, *, divisor: int = 1, inplace: bool = False
) -> Params:
    """The sums over all parts of the batch of gradients that each process has of its own part, divided by `divisor`.

    Those of sharded leaves are summed over "fsdp" already (`materialize`). layout: None for parameters that are whole
    on every process; of leaves that it does not have, such as those of a LoRA, they are. Added in the order of the
    processes and sent together. inplace: write the sums into the leaves, which must not overlap.
    """
    placements = tree.flatten_paths(layout) if layout is not None else {}
    kinds: dict[tuple[torch.dtype, bool], list[str]] = defaultdict(list)
    flat = tree.flatten_paths(grads)
    for path, leaf in flat.items():
        kinds[leaf.dtype, is_sharded(placements.get(path))].append(path)
    summed: dict[str, Tensor] = {}
    for (_, has_part), paths in kinds.items():
        group = mesh.group("data") if has_part else mesh.group(*BATCH_AXES)
        for some in _buckets(paths, flat):
            if group is None:
                parts = [flat[path] for path in some]
                parts = [part.div_(divisor) if inplace else part / divisor for part in parts] if divisor > 1 else parts
            else:
                total = transport.total(torch.cat([flat[path].reshape(-1) for path in some]), group)
                total = total.div_(divisor) if divisor > 1 else total
                parts = [
                    flat[path].copy_(part.view(flat[path].shape)) if inplace else part.view(flat[path].shape)
                    for path, part in zip(some, total.split([flat[path].numel() for path in some]), strict=True)
                ]
            summed |= dict(zip(some, parts, strict=True))
    return tree.map_with_path(lambda path, leaf: summed[path], grads)


def sum_gradient(gradient: Tensor, placement: Placement | None, mesh: Mesh, *, divisor: int = 1) -> Tensor:
    """`sum_gradients` of one leaf, whose placement is None where the layout does not have it."""
    group = mesh.group("data") if is_sharded(placement) else mesh.group(*BATCH_AXES)
    total = gradient if group is None else transport.total(gradient, group)
    return total / divisor if divisor > 1 else total


def mean(values: Tree, mesh: Mesh) -> Tree:
    """Means of float tensors over the parts of the batch, summed in the order of the processes as gradients are."""
    group, count = mesh.group(*BATCH_AXES), mesh.size(*BATCH_AXES)
    leaves = tree.leaves(values)
    if group is None or not leaves:
        return values
    wide = torch.float64 if any(leaf.dtype == torch.float64 for leaf in leaves) else torch.float32
    total = transport.total(torch.cat([leaf.detach().to(wide).reshape(-1) for leaf in leaves]), group).div_(count)
    parts = iter(total.split([leaf.numel() for leaf in leaves]))
    return tree.map(lambda leaf: next(parts).view(leaf.shape).to(leaf.dtype), values)


def norm(grads: Params, layout: Layout | None, mesh: Mesh) -> Tensor:
    """Global norm of summed gradients: sqrt of the sum of squares of all leaves of the whole, float32 ()."""
    placements = tree.flatten_paths(layout) if layout is not None else {}
    kinds: dict[tuple[bool, bool], list[Tensor]] = defaultdict(list)
    for path, leaf in tree.flatten_paths(grads).items():
        placement = placements.get(path)
        kinds[is_sharded(placement), placement is not None and placement.cut is not None].append(leaf)
    if set(kinds) == {(False, False)}:
        return leafwise.global_norm(kinds[False, False])
    squares = []
    for (has_part, is_cut), leaves in sorted(kinds.items()):
        own = leafwise.global_norm(leaves).square()
        own = collectives.psum(own, mesh.group(AXIS)) if has_part else own
        squares.append(collectives.psum(own, mesh.group("tensor")) if is_cut else own)
    return torch.stack(squares).sum().sqrt()


def positions(layout: Layout | None, mesh: Mesh) -> dict[str, Positions]:
    """Path -> where the numbers of this process's part of a leaf are in the whole, of leaves that are divided."""
    placements = {} if layout is None else tree.flatten_paths(layout)
    divided = {path: placement for path, placement in placements.items() if placement.is_divided}
    return {path: partial(_positions, placement, mesh) for path, placement in divided.items()}


def _positions(placement: Placement, mesh: Mesh, numbers: Tensor) -> Tensor:
    if placement.dim is not None:
        numbers = placement.part(mesh).positions(numbers)
    if placement.cut is not None:
        (dim, matrices), shape = placement.cut, placement.shape
        size = shape[dim] // matrices
        whole = (*shape[:dim], matrices, size * mesh.size("tensor"), *shape[dim + 1 :])
        numbers = prng.Part(whole, dim + 1, mesh.index("tensor") * size, size).positions(numbers)
    return numbers


def state_layout(state: Tree, layout: Layout, mesh: Mesh) -> Layout:
    """The placements of the leaves of a training state: of its parameters, and of what has a leaf for each of them.

    A leaf belongs to the parameter whose path its own ends with, where it has the shape of its part; or, one name less,
    that of a moment in 8 bits: codes, and scales (rows, blocks a row) or (blocks,), of blocks that no part cuts.
    """
    placements = tree.flatten_paths(layout)

    def place(path: str, leaf: Tensor) -> Placement:
        names = path.split(".")
        for start in range(len(names)):
            placement = placements.get(".".join(names[start:]))
            if placement is not None and tuple(leaf.shape) == placement.local_shape(mesh):
                return placement
            stored = placements.get(".".join(names[start:-1]))
            if stored is not None and names[-1] == "codes":
                return stored
            if stored is not None and names[-1] == "scale":
                return _of_scales(stored, tuple(leaf.shape), mesh)
        return Placement(tuple(leaf.shape))

    return tree.map_with_path(place, state)


def _of_scales(placement: Placement, part: tuple[int, ...], mesh: Mesh) -> Placement:
    """Placement of the scales of a divided leaf: along its rows or the blocks of a row; part: their shape."""
    last = len(part) - 1
    dim = None if placement.dim is None else min(placement.dim, last)
    cut = None if placement.cut is None else placement.cut._replace(dim=min(placement.cut.dim, last))
    count = mesh.size(AXIS)
    return Placement(tuple(size * count if at == dim else size for at, size in enumerate(part)), dim, cut)


def _own(leaf: Tensor, placement: Placement, mesh: Mesh) -> Tensor:
    if placement.dim is None:
        return leaf
    part = placement.part(mesh)
    return leaf.narrow(part.dim, part.start, part[part.dim]).clone(memory_format=torch.contiguous_format)


BUCKET = 1 << 25
"""Elements that are summed at once: few messages, and a bounded copy."""


def _buckets(paths: list[str], flat: dict[str, Tensor]) -> Iterator[list[str]]:
    some: list[str] = []
    for path in chain(paths, [None]):
        if some and (path is None or sum(flat[one].numel() for one in some) + flat[path].numel() > BUCKET):
            yield some
            some = []
        if path is not None:
            some.append(path)
