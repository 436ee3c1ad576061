"""Tensor parallelism: the heads of an attention and the hidden features of an MLP divided over processes.

Shoeybi et al. 2019, "Megatron-LM" (arXiv:1909.08053), section 3: layers into the heads or the hidden features are
divided by outputs (columns), layers out of them by inputs (rows), whose products are summed over the processes; what
lies between them needs no communication. Layers of modulations (adaLN), a third of an MMDiT's parameters, are divided
by outputs too, and their results, which are small, are put together.

Arguments and results of such a layer are the same on all processes, and so are the gradients of what is not divided
(`replicated`); the gradient of a divided leaf is that of its part.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core import spec as specs
from functional_sd3.core.spec import FUSED, Param
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.parallel import collectives
from functional_sd3.parallel.mesh import Mesh
from functional_sd3.parallel.replicated import enter, join
from functional_sd3.parallel.transport import Group, group_index, group_size

AXES = ("heads", "qkv", "key_value", "hidden", "gated", "modulation")
"""Logical axes (`spec.AXES`) that are divided; a fused one matrix by matrix."""


class Cut(NamedTuple):
    """The dimension of a leaf that is divided, and the number of matrices that lie along it."""

    dim: int
    parts: int


def cut(params: Params, spec: Tree, mesh: Mesh, *, heads: int) -> Params:
    """This process's part of whole parameters, by the axis "tensor" of the mesh: copies of what is divided.

    spec: of the network, or of a LoRA for it. Leaves that layers may have beside their spec (a scale, "low_rank") are
    divided with their weight. heads: of the network's attention. Raises ValueError where these or a leaf do not divide.
    """
    count, index = mesh.size("tensor"), mesh.index("tensor")
    check_heads(heads, count)
    return params if count == 1 else _map(lambda path, leaf, at: _own(path, leaf, at, index, count), params, spec)


def own_leaf(path: str, leaf: Tensor, at: Cut, mesh: Mesh) -> Tensor:
    """This process's part of a leaf. Raises ValueError, naming the path, where it does not divide."""
    return _own(path, leaf, at, mesh.index("tensor"), mesh.size("tensor"))


def join_leaf(leaf: Tensor, at: Cut, mesh: Mesh) -> Tensor:
    """The whole leaf, on all processes, of which each has its part."""
    parts = leaf.unflatten(at.dim, (at.parts, -1))
    return collectives.all_gather(parts, mesh.group("tensor"), at.dim + 1).flatten(at.dim, at.dim + 1)


def whole(params: Params, spec: Tree, mesh: Mesh) -> Params:
    """The whole parameters, on all processes, of which each has its part: the inverse of `cut`."""
    if mesh.size("tensor") == 1:
        return params
    return _map(lambda path, leaf, at: join_leaf(leaf, at, mesh), params, spec)


def part_spec(spec: Tree, mesh: Mesh, *, heads: int) -> Tree:
    """The spec of this process's part, initialised as that part of the whole is. Raises ValueError as `cut` does."""
    count, index = mesh.size("tensor"), mesh.index("tensor")
    check_heads(heads, count)

    def part(path: str, leaf: Param) -> Param:
        at = cut_of(leaf)
        if at is None or count == 1:
            return leaf
        _check_size(path, leaf.shape[at.dim], at, count)
        shape = tuple(size // count if dim == at.dim else size for dim, size in enumerate(leaf.shape))

        def init(key: Key, _: tuple[int, ...]) -> Tensor:
            return _own(path, leaf.init(key, leaf.shape), at, index, count)

        return replace(leaf, shape=shape, init=init)

    return specs.map_params(part, spec)


def check_heads(heads: int, count: int) -> None:
    """Raises ValueError where heads do not divide over `count` processes."""
    if heads % count:
        fitting = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        raise ValueError(
            f"the mesh has tensor={count}, but the {heads} heads of the attention divide over {fitting} processes only"
        )


def cut_of(leaf: Param) -> Cut | None:
    """Division of a leaf: along its first axis of `AXES`."""
    for dim, axis in enumerate(leaf.axes):
        if axis in AXES:
            return Cut(dim, FUSED.get(axis, (axis, 1))[1])
    return None


def columns(params: Params, group: Group) -> Params:
    """A linear layer of which each process has part of the outputs; its input must have passed through `enter`."""
    if group is None or "low_rank" not in params:
        return params
    low_rank = params["low_rank"]
    return {**params, "low_rank": {**low_rank, "down": enter(low_rank["down"], group)}}


def linear_rows(params: Params, x: Tensor, group: Group) -> Tensor:
    """A linear layer of which each process has part of the inputs: x (..., own inputs) -> (..., outputs) of all."""
    if group is None:
        return layers.linear(params, x)
    own = {name: leaf for name, leaf in params.items() if name != "bias"}
    own |= {name: enter(own[name], group) for name in layers.SCALES if name in own}
    if "low_rank" in own:
        own["low_rank"] = {**own["low_rank"], "up": enter(own["low_rank"]["up"], group)}
    y = collectives.psum(layers.linear(own, x), group)
    return y + params["bias"].to(y.dtype) if "bias" in params else y


def mlp(params: Params, x: Tensor, activation: str, group: Group) -> Tensor:
    """`layers.mlp` of which each process has part of the hidden features."""
    hidden = layers.linear_activation(columns(params["in"], group), enter(x, group), activation)
    return linear_rows(params["out"], hidden, group)


def linear_joined(params: Params, x: Tensor, group: Group) -> Tensor:
    """A linear layer of which each process has part of the outputs, put together: the modulations."""
    y = layers.linear(columns(params, group), enter(x, group))
    return join(y, group, -1, (y.shape[-1],) * group_size(group))


def own_heads(x: Tensor, group: Group) -> Tensor:
    """This process's heads of x (batch, heads, ...), which is the same on all processes."""
    if group is None:
        return x
    size = x.shape[1] // group_size(group)
    return enter(x, group).narrow(1, size * group_index(group), size)


def _own(path: str, leaf: Tensor, at: Cut, index: int, count: int) -> Tensor:
    size = _check_size(path, leaf.shape[at.dim], at, count)
    parts = leaf.unflatten(at.dim, (at.parts, -1)).narrow(at.dim + 1, index * size, size)
    # A copy: a view would keep the whole in memory.
    return parts.flatten(at.dim, at.dim + 1).clone()


def _check_size(path: str, size: int, at: Cut, count: int) -> int:
    if size % (at.parts * count):
        matrices = f" of {at.parts} matrices" if at.parts > 1 else ""
        raise ValueError(
            f"the mesh has tensor={count}, which does not divide the {size} rows or columns{matrices} of {path}"
        )
    return size // (at.parts * count)


def _map(change: Callable[[str, Tensor, Cut], Tensor], params: Tree, spec: Tree, path: str = "") -> Tree:
    """The parameters with `change` of every leaf that is divided."""
    prefix = path + "." if path else ""
    if isinstance(spec, list):
        pairs = zip(params, spec, strict=True)
        return [_map(change, part, own, f"{prefix}{index}") for index, (part, own) in enumerate(pairs)]
    if isinstance(spec, Param):
        at = cut_of(spec)
        return params if at is None else change(path, params, at)
    beside = _beside_weight(spec["weight"]) if isinstance(spec.get("weight"), Param) else {}
    changed: dict[str, Any] = {}
    for name, part in params.items():
        if name in spec:
            changed[name] = _map(change, part, spec[name], prefix + name)
        elif name in beside:
            changed[name] = _map(change, part, beside[name], prefix + name)
        else:
            raise ValueError(f"{prefix}{name} is in no spec of a network, so that it is not known how it is divided")
    return changed


def _beside_weight(weight: Param) -> Tree:
    """Specs of what a layer may have beside its weight, in their axes alone."""
    outputs, *inputs = weight.axes
    low_rank = {"down": _axes("rank", *inputs), "up": _axes(outputs, "rank")}
    return {"bias": _axes(outputs), **dict.fromkeys(layers.SCALES, _axes(outputs)), "low_rank": low_rank}


def _axes(*axes: str | None) -> Param:
    return Param((1,) * len(axes), specs.zeros, axes)
