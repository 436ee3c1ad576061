"""Muon: momentum whose matrices are orthogonalised before they are applied.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (the quintic Newton-Schulz iteration and
its coefficients); the scale of the update that lets it share AdamW's learning rate: Liu et al. 2025, "Muon is scalable
for LLM training", equation 4.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Params, Tree
from functional_sd3.parallel import collectives
from functional_sd3.parallel.mesh import Mesh
from functional_sd3.parallel.placement import AXIS, Layout, Placement
from functional_sd3.training.optim import Optimizer, Schedule, chain, scale_by_learning_rate, zeros_like

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
UPDATE_RMS = 0.2


Orthogonalized = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Momenta by path -> the updates of their leaves."""


class MuonState(NamedTuple):
    """The momentum, a tree like the parameters."""

    momentum: Tree


def muon(
    rate: float | Schedule, *, momentum: float = 0.95, iterations: int = 5, dtype: torch.dtype | None = None
) -> Optimizer:
    """Muon with Nesterov momentum for leaves of two or more dimensions; others raise ValueError.

    Convolutions count as matrices (outputs, inputs * height * width), and a fused query-key-value matrix (3 n, n) as
    three. Every update has the root mean square 0.2, AdamW's typical one, times `rate`. `dtype`: of the iteration,
    for which bfloat16 suffices (Jordan et al.); by default the gradients'.
    """
    return chain(scale_by_muon(momentum=momentum, iterations=iterations, dtype=dtype), scale_by_learning_rate(rate))


def scale_by_muon(*, momentum: float = 0.95, iterations: int = 5, dtype: torch.dtype | None = None) -> Optimizer:
    """Orthogonalised momentum, in the direction of ascent as the gradients."""
    return _scale_by_muon(momentum, partial(_orthogonalized, iterations=iterations, dtype=dtype))


def _scale_by_muon(momentum: float, orthogonalized: Orthogonalized) -> Optimizer:
    def init(params: Params) -> MuonState:
        for path, leaf in tree.flatten_paths(params).items():
            if leaf.ndim < 2:
                raise ValueError(f"{path} has shape {list(leaf.shape)}; Muon orthogonalises matrices: give it to AdamW")
        return MuonState(zeros_like(params))

    def update(grads: Tree, state: MuonState, params: Params) -> tuple[Tree, MuonState]:
        averaged = tree.map(lambda past, grad: momentum * past + grad, state.momentum, grads)
        nesterov = tree.map(lambda past, grad: grad + momentum * past, averaged, grads)
        updates = orthogonalized(tree.flatten_paths(nesterov))
        return tree.map_with_path(lambda path, leaf: updates[path], nesterov), MuonState(averaged)

    def sharded(layout: Layout, mesh: Mesh) -> Optimizer:
        if any(placement.cut is not None for placement in tree.leaves(layout)):
            raise ValueError(
                f"Muon turns whole matrices, of which a mesh with tensor={mesh.size('tensor')} leaves each process a "
                "part: use AdamW, or divide data, fsdp or sequence"
            )
        return _scale_by_muon(momentum, partial(_of_shards, orthogonalized, tree.flatten_paths(layout), mesh))

    return Optimizer(init, update, sharded=sharded)


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """(..., rows, columns) -> about the nearest matrices with orthonormal rows or columns: singular values near 1.

    Five iterations bring every singular value that is not tiny into about [0.7, 1.2].
    """
    a, b, c = COEFFICIENTS
    transposed = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if transposed else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


def _orthogonalized(flat: dict[str, Tensor], iterations: int, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Orthogonalised leaves by path; matrices of one shape are stacked, for few large products instead of many."""
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    parts: dict[str, Tensor] = {}
    for path, leaf in flat.items():
        matrix = leaf.flatten(1)
        rows, columns = matrix.shape
        parts[path] = matrix.reshape(3, columns, columns) if rows == 3 * columns and leaf.ndim == 2 else matrix[None]
        groups[tuple(parts[path].shape[1:])].append(path)
    updates: dict[str, Tensor] = {}
    for shape, names in groups.items():
        scale = UPDATE_RMS * math.sqrt(max(shape))
        stacked = torch.cat([parts[name] for name in names])
        orthogonal = scale * orthogonalize(stacked.to(dtype or stacked.dtype), iterations).to(stacked.dtype)
        for name, part in zip(names, orthogonal.split([len(parts[name]) for name in names]), strict=True):
            updates[name] = part.reshape(flat[name].shape)
    return {path: updates[path] for path in flat}


def _of_shards(
    orthogonalized: Orthogonalized, placements: dict[str, Placement], mesh: Mesh, flat: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The parts of orthogonalised leaves, of parts of leaves.

    Leaves of one shape are exchanged in rounds of as many as there are processes, each of which has one of them whole.
    """
    group, count = mesh.group(AXIS), mesh.size(AXIS)
    sharded = [path for path in flat if path in placements and placements[path].dim is not None]
    rounds: dict[tuple, list[str]] = defaultdict(list)
    for path in sharded:
        rounds[placements[path].dim, tuple(flat[path].shape), flat[path].dtype].append(path)
    updates = orthogonalized({path: leaf for path, leaf in flat.items() if path not in set(sharded)})
    for (dim, _, _), paths in rounds.items():
        for start in range(0, len(paths), count):
            some = paths[start : start + count]
            own = [flat[path] for path in some]
            parts = torch.stack(own + [torch.zeros_like(own[0])] * (count - len(own)))
            whole = collectives.all_to_all(parts, group, 0, dim + 1)[0]
            # Neither the name nor the shape of a leaf determines how it is cut into matrices.
            turned = orthogonalized({some[0]: whole})[some[0]]
            back = collectives.all_to_all(turned[None], group, dim + 1, 0)
            updates |= dict(zip(some, back.unbind(0), strict=False))
    return {path: updates[path] for path in flat}
