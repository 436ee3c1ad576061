"""Weights in the order in which a CPU multiplies by them, made once for all evaluations of a run.

oneDNN reads a weight in blocks, which it otherwise makes anew in every product (`kernels.prepacked`). The numbers are
the same, and so is every result to the bit; a step of a transformer of width 512 takes 0.93 to 0.96 of the time on a
Zen 4.

    params = {**model.params, "transformer": prepack.prepack(model.params["transformer"])}
    images = pipeline.generate(params, model.config, ...)

This is the last of all changes of a tree: quantise, merge and add LoRAs before. Only eager products read such weights:
derivatives and mapped calls unpack one in every product, and files, compiled code and `tree.cast` need `unpack`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core.types import Params, Tree

CONDITIONING = frozenset({"modulation", "time", "pooled", "interval"})
"""Names of layers of the conditioning vector, of which the pipeline multiplies a run's rows once."""


def prepack(params: Params, *, donate: bool = False) -> Params:
    """The tree with the weights of its large linear layers pre-packed, where this processor multiplies by them faster.

    For a transformer or a ControlNet on a CPU, in float32 on processors of which `kernels.products` has oneDNN multiply
    whatever the rows, or in bfloat16. Layers that see one row a sample, that are applied in part, without bias, or
    stored with a scale or a LoRA stay as they are. It costs about as much as one copy of the weights.
    donate: change the given tree itself, so that never more than one weight is in memory twice; it is what is returned.
    """

    def change(path: tuple[str, ...], layer: Params) -> Tensor:
        return layer["weight"] if CONDITIONING.intersection(path) else layers.packed_weight(layer)

    return _with_weights(params, change, donate, ())


def unpack(params: Params, *, donate: bool = False) -> Params:
    """The tree with plain weights, as before `prepack`; donate: as there."""

    def change(path: tuple[str, ...], layer: Params) -> Tensor:
        return layer["weight"].to_dense() if layer["weight"].is_mkldnn else layer["weight"]

    return _with_weights(params, change, donate, ())


@torch.no_grad()
def _with_weights(
    node: Tree, change: Callable[[tuple[str, ...], Params], Tensor], donate: bool, path: tuple[str, ...]
) -> Any:
    """The tree in which `change(path, layer)` replaces the weight of each layer that has one."""
    if isinstance(node, list):
        parts = [_with_weights(part, change, donate, path) for part in node]
        return node if donate else parts
    if not isinstance(node, dict):
        return node
    changed = node if donate else dict(node)
    if isinstance(node.get("weight"), Tensor):
        changed["weight"] = change(path, node)
        return changed
    for name, part in node.items():
        # Of a context without queries the last block applies a part of the layer.
        if name != "qkv" or "out" in node:
            changed[name] = _with_weights(part, change, donate, (*path, name))
    return changed
