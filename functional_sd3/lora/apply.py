"""A LoRA added to parameters: exactly, lazily beside the weights, or so that it can be taken out again."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import layers as layers_of_model
from functional_sd3.core import spec as specs
from functional_sd3.core import tree
from functional_sd3.core.spec import Param
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.layouts import components
from functional_sd3.lora import keys as lora_keys
from functional_sd3.lora import tree as adapters
from functional_sd3.lora.tree import Lora, LoraEntry

ATTENTION = "transformer.blocks.*.attention*"
"""Every attention of the transformer: query, key, value and output of both streams, and of second attentions."""

Scale = float | Tensor | Callable[[str], float | Tensor]
"""Strength of a LoRA: one number, or a function of the path of the weight."""


class Merged(NamedTuple):
    """Parameters with a LoRA in them, and by path what their adapted weights were before."""

    params: Params
    originals: dict[str, Tensor]


def spec(
    described: components.Config | Tree, rank: int, targets: tree.Chooser = ATTENTION, *, alpha: float | None = None
) -> Tree:
    """Spec of a LoRA for a model, given by its config or its spec: an adapter for every matrix that `targets` chooses.

    targets: of the linear and convolution weights, by path; query, key and value get adapters of their own. alpha: the
    rank by default, so that the scaling is 1; it is not trainable. `down` starts as PEFT's does, `up` at zero.
    Raises ValueError for a rank below 1 or above that of every matrix, or targets that choose nothing.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} must be at least 1")
    leaves = tree.select(components.spec(described) if isinstance(described, components.Config) else described, targets)
    chosen = {path: leaf for path, leaf in leaves.items() if lora_keys.adaptable(path, len(leaf.shape))}
    if not chosen:
        raise ValueError(f"targets {targets!r} choose no weight of a linear or convolution layer")
    full = max(min(leaf.shape[0], math.prod(leaf.shape[1:])) for leaf in chosen.values())
    if rank > full:
        raise ValueError(
            f"rank {rank} (--lora) must be at most {full}, the rank that the largest adapted matrix itself can have"
        )
    parts = lora_keys.parts(chosen)
    return adapters.build({path: _entry_spec(leaf, rank, parts[path], alpha or rank) for path, leaf in chosen.items()})


def init(
    key: Key,
    described: components.Config | Tree,
    rank: int,
    targets: tree.Chooser = ATTENTION,
    *,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Lora:
    """An initial LoRA of `spec`, which changes nothing yet."""
    return specs.init(key, spec(described, rank, targets, alpha=alpha), dtype=dtype, device=device)


def apply(
    params: Params,
    lora: Lora | Sequence[Lora],
    scale: Scale | Sequence[Scale] = 1.0,
    *,
    lazy: bool = False,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Params:
    """The parameters W + scale * alpha / rank * up @ down, for one LoRA or the sum of several, each with its scale.

    params: the tree of a whole model ("transformer", "clip_l", ...). Leaves that are not adapted are shared with the
    result, adapted ones are added up in float32 and rounded once. lazy: weights are left alone too, and layers add the
    low-rank product to what they compute: the same but for rounding, right for training, for weights in int8 or float8,
    and for many LoRAs over one base (vmap over a stack of them: `in_axes=(None, 0)`). Entries that are no low-rank
    product (LoHa, LoKr, DoRA, differences) are added to the weight all the same; beside a weight in int8 or float8 they
    are kept as a matrix of the scale's dtype. A DoRA's `scale` multiplies its whole difference from the weight. shapes:
    of whole weights by path, where those of `params` are parts that are gathered when they are used
    (`parallel.sharding`), which needs `lazy`.

    Raises ValueError naming what the parameters lack or what does not fit them.
    """
    given = _given(lora, scale)
    _check(params, given, shapes or {})
    return _adapted("", params, given, lazy)


def merge(params: Params, lora: Lora | Sequence[Lora], scale: Scale | Sequence[Scale] = 1.0) -> Merged:
    """`apply` and the original weights, by which `unmerge` takes the LoRA out again, exact to the bit.

    The original weights are the tensors of `params` themselves: they cost no memory as long as these are in use anyway.
    """
    adapted = {path for _, path in _pairs(_given(lora, scale))}
    return Merged(apply(params, lora, scale), tree.select(params, lambda path, leaf: path in adapted))


def unmerge(merged: Merged) -> Params:
    """The parameters as they were before `merge`."""
    return tree.map_with_path(lambda path, leaf: merged.originals.get(path, leaf), merged.params)


def _entry_spec(leaf: Param, rank: int, parts: int, alpha: float) -> Tree:
    inputs, rows = leaf.shape[1:], leaf.shape[0] // parts
    outputs = specs.FUSED[leaf.axes[0]][0] if parts > 1 and leaf.axes[0] in specs.FUSED else leaf.axes[0]
    adapter = {
        "down": Param((rank, *inputs), specs.fan_in_uniform(math.prod(inputs)), ("rank", *leaf.axes[1:])),
        "up": Param((rows, rank), specs.zeros, (outputs, "rank")),
        "alpha": Param((), specs.constant(float(alpha)), (), trainable=False),
    }
    return adapter if parts == 1 else [adapter] * parts


Given = list[tuple[dict[str, LoraEntry], Scale]]


def _given(lora: Lora | Sequence[Lora], scale: Scale | Sequence[Scale]) -> Given:
    loras = list(lora) if isinstance(lora, (list, tuple)) else [lora]
    scales: list[Any] = list(scale) if isinstance(scale, (list, tuple)) else [scale] * len(loras)
    if len(scales) != len(loras):
        raise ValueError(f"{len(scales)} scales do not fit {len(loras)} LoRAs")
    return [(adapters.entries(one), own) for one, own in zip(loras, scales, strict=True)]


def _pairs(given: Given) -> list[tuple[int, str]]:
    return [(index, path) for index, (entries, _) in enumerate(given) for path in entries]


def _at(scale: Scale, path: str) -> float | Tensor:
    return scale(path) if callable(scale) and not isinstance(scale, Tensor) else scale


def _check(params: Params, given: Given, shapes: Mapping[str, tuple[int, ...]]) -> None:
    leaves = tree.flatten_paths(params)
    problems = []
    for entries, _ in given:
        for path, entry in entries.items():
            if path not in leaves:
                problems.append(f"{path}, which the LoRA adapts, is not among the parameters")
            else:
                problems += adapters.check(path, entry, shapes.get(path, tuple(leaves[path].shape)))
    if not _pairs(given):
        raise ValueError("a LoRA without adapters cannot be applied")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError("; ".join(problems[:5]) + more)


def _adapted(path: str, params: Tree, given: Given, lazy: bool) -> Tree:
    if not isinstance(params, (dict, list)):
        return params
    if isinstance(params, list):
        return [_adapted(f"{path}{index}.", child, given, lazy) for index, child in enumerate(params)]
    layer = {name: _adapted(f"{path}{name}.", child, given, lazy) for name, child in params.items()}
    for name in params:
        pairs = [(entries[path + name], _at(scale, path + name)) for entries, scale in given if path + name in entries]
        if pairs and lazy and lora_keys.adaptable(path + name, layer[name].ndim):
            layer |= _lazily(path + name, layer, pairs)
        elif pairs:
            layer[name] = _added(path + name, layer, name, pairs)
    return layer


Pairs = list[tuple[LoraEntry, float | Tensor]]


def _lazily(path: str, layer: Params, pairs: Pairs) -> Params:
    """Entries that replace those of a layer: low-rank factors beside its weight; the rest is added to the weight or,
    if that is stored with a scale, is kept beside it as a product with the identity."""
    factors = [adapters.factors(entry) + (by,) for entry, by in pairs if adapters.is_low_rank(entry)]
    dense = [(entry, by) for entry, by in pairs if not adapters.is_low_rank(entry)]
    changed = {}
    scale = layers_of_model.stored_scale(layer)
    if dense and scale is not None:
        weight = layers_of_model.dequantized_weight(layer, torch.float32)
        changes = [adapters.change(entry, weight, by) for entry, by in dense]
        change = functools.reduce(torch.add, changes)
        identity = torch.eye(change[0].numel(), dtype=scale.dtype, device=change.device)
        factors.append((identity.unflatten(1, change.shape[1:]), change.flatten(1).to(scale.dtype), 1.0))
    elif dense:
        changed["weight"] = _added(path, layer, "weight", dense)
    if not factors:
        return changed
    downs = [*([layer["low_rank"]["down"]] if "low_rank" in layer else []), *(down for down, _, _ in factors)]
    ups = [*([layer["low_rank"]["up"]] if "low_rank" in layer else []), *(up * scale for _, up, scale in factors)]
    return {**changed, "low_rank": {"down": torch.cat(downs), "up": torch.cat(ups, dim=1)}}


def _added(path: str, layer: Params, name: str, pairs: Pairs) -> Tensor:
    leaf = layer[name]
    if name == "weight" and layers_of_model.stored_scale(layer) is not None:
        raise ValueError(
            f"{path} is stored in {leaf.dtype} with a scale: apply the LoRA with lazy=True (`generate --lora`), or "
            f"dequantize first (`convert --dtype bfloat16`)"
        )
    if leaf.element_size() < 2:
        raise ValueError(
            f"{path} is stored in {leaf.dtype} without a scale, too coarse for a LoRA to be added: load it with "
            f"dtype=torch.bfloat16, or `convert --dtype bfloat16` first"
        )
    changes = [adapters.change(entry, leaf, scale) for entry, scale in pairs]
    return (leaf.to(torch.promote_types(leaf.dtype, changes[0].dtype)) + sum(changes)).to(leaf.dtype)
