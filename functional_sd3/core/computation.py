"""Computation of a network's blocks (materialised, rematerialised, divided): equal values and gradients, other memory.

A `Computation` belongs to a component of a model and is kept in the model's config, which every objective and the
pipeline have, so that none of them needs arguments for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from functional_sd3.core import layers, rematerialise
from functional_sd3.core.types import Params

Materialize = Callable[[Params], Params]
"""Parameters as they are stored -> as they are computed with: of one block, or of all that is in no block."""
OneBlockTransform = Callable[[Callable[..., Any]], Callable[..., Any]]
BlockTransform = OneBlockTransform | Mapping[int, OneBlockTransform]
"""The function that applies one block -> another in its place: one for all blocks, or for those whose index it has."""


@dataclass(frozen=True)
class Computation:
    """The arguments `materialize`, `block_transform` and `mesh` of `mmdit.apply`, `t5.apply` and `clip.apply`.

    materialize: applied to the parameters of one block inside the function that `block_transform` gets, and to those
    outside of blocks: sharded -> gathered, on the host -> on the device, stored -> computed. block_transform: applied
    to the function that applies one block, such as `transform.remat`, or one for each index of a block. mesh: a
    `parallel.mesh.Mesh`, over whose axes tensor and sequence the work of every block is divided. layout: a
    `parallel.sharding.Layout` where the parameters are parts of the whole, for which `materialize` and `mesh` are; it
    is not passed to the network.
    """

    materialize: Materialize | None = None
    block_transform: BlockTransform | None = None
    mesh: Any = None
    layout: Any = None

    @property
    def options(self) -> dict[str, Any]:
        """The arguments by name, those that are None left out."""
        given = {"materialize": self.materialize, "block_transform": self.block_transform, "mesh": self.mesh}
        return {name: value for name, value in given.items() if value is not None}


PLAIN = Computation()
"""Blocks as they are."""


def of(config: Any, name: str) -> Computation:
    """The computation of a component, by its name in the config of a whole model; `PLAIN` where there is none."""
    return getattr(config, "computations", {}).get(name, PLAIN)


def cast(params: Params, computation: Computation, dtype: torch.dtype | None) -> tuple[Params, Computation]:
    """Parameters and computation of a component with its values in `dtype` (None: as they are).

    All parameters are cast at once, by one kernel; but where blocks are materialised or transformed, each block inside
    its function, so that rematerialised blocks keep no copies.
    """
    if dtype is None:
        return params, computation
    if computation == PLAIN:
        return layers.cast(params, dtype), computation
    return params, replace(computation, materialize=_then_cast(computation.materialize, dtype))


def cast_model(params: Params, config: Any, dtype: torch.dtype | None) -> tuple[Params, Any]:
    """Parameters and config of a whole model with its values in `dtype`: `cast` of every component."""
    computations = getattr(config, "computations", {})
    if dtype is None or not computations:
        return (params if dtype is None else layers.cast(params, dtype)), config
    pairs = {name: cast(part, of(config, name), dtype) for name, part in params.items()}
    changed = {**computations, **{name: computed for name, (_, computed) in pairs.items()}}
    return {name: part for name, (part, _) in pairs.items()}, replace(config, computations=changed)


def materialize_rest(params: Params, materialize: Materialize | None) -> Params:
    """Parameters of a network of which all but the blocks are materialised."""
    if materialize is None:
        return params
    rest = materialize({name: part for name, part in params.items() if name != "blocks"})
    return {name: params[name] if name == "blocks" else rest[name] for name in params}


def block_functions(
    apply: Callable[..., Any], materialize: Materialize | None, block_transform: BlockTransform | None, depth: int
) -> list[Callable[..., Any]]:
    """For each of `depth` blocks `apply(block, ...)` with its parameters materialised inside, and all of that
    transformed; one function for all where `block_transform` is none or one.

    Materialised parameters are not kept for the backward pass: a transform that recomputes materialises it again, and
    without a transform `rematerialise` does. Raises ValueError for the index of a block that is not there.
    """
    inner = apply if materialize is None else _materialized(apply, materialize)
    plain = apply if materialize is None else partial(rematerialise.call, apply, materialize)
    if not isinstance(block_transform, Mapping):
        return [block_transform(inner) if block_transform else plain] * depth
    if absent := sorted(set(block_transform) - set(range(depth))):
        raise ValueError(f"block_transform {absent} are not among the blocks 0 to {depth - 1}")
    return [block_transform[index](inner) if index in block_transform else plain for index in range(depth)]


def composed(outer: OneBlockTransform, inner: BlockTransform | None, depth: int) -> BlockTransform:
    """A block transform of `depth` blocks: `outer` of the function of every block, after `inner`."""
    if inner is None:
        return outer
    if not isinstance(inner, Mapping):
        return lambda apply: outer(inner(apply))
    return {index: _composed(outer, inner[index]) if index in inner else outer for index in range(depth)}


def _composed(outer: OneBlockTransform, inner: OneBlockTransform) -> OneBlockTransform:
    return lambda apply: outer(inner(apply))


def _materialized(apply: Callable[..., Any], materialize: Materialize) -> Callable[..., Any]:
    return lambda block, *inputs, **options: apply(materialize(block), *inputs, **options)


def then(*steps: Materialize) -> Materialize:
    """One `materialize` that applies several, in order: from the file to the device, from int8 to what computes."""

    def materialize(part: Params) -> Params:
        for step in steps:
            part = step(part)
        return part

    return materialize


def _then_cast(materialize: Materialize | None, dtype: torch.dtype) -> Materialize:
    return lambda block: layers.cast(block if materialize is None else materialize(block), dtype)
