"""What a LoRA is: a tree of adapters, by the paths of the weights they adapt.

An adapter is {"down": (rank, inputs, ...), "up": (outputs, rank), "alpha": ()} and adds alpha / rank * up @ down to its
weight (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1). Where a weight of ours is
several matrices of a file one below the other (query, key and value), its place holds one adapter over all of them, or
a list with one for each, {} for those that are left alone. Lists of blocks hold {} for blocks that are left alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core.types import Tree

Adapter = dict[str, Tensor]
Node = Any
"""What stands at the path of one weight: an adapter, or a list of adapters and {}."""

Lora = Tree
"""Nested dicts and lists with a node at the path of every adapted weight."""


def nodes(lora: Lora) -> dict[str, Node]:
    """Every node by the path of the weight it adapts ("transformer.blocks.0.image.attention.qkv.weight")."""
    return dict(_walk("", lora))


def build(found: Mapping[str, Node]) -> Lora:
    """The tree of nodes by path; the inverse of `nodes`."""
    root: dict[str, Any] = {}
    for path, node in found.items():
        *branches, name = path.split(".")
        place = root
        for branch in branches:
            place = place.setdefault(branch, {})
        place[name] = _Leaf(node)
    return _settle(root)


def rank(adapter: Adapter) -> int:
    return adapter["down"].shape[0]


def scaling(adapter: Adapter) -> Tensor:
    """alpha / rank, ()."""
    return adapter["alpha"] / rank(adapter)


def members(node: Node) -> list[Adapter]:
    """The adapters of a node, one or several."""
    return [node] if isinstance(node, dict) else [part for part in node if part]


def separate(node: Node, parts: int) -> list[Adapter]:
    """The node as a list of `parts`: an adapter over all of them gives each the same `down` and a part of its `up`.

    Raises ValueError when the node is of another number of parts.
    """
    if isinstance(node, dict):
        return [{**node, "up": up} for up in node["up"].chunk(parts)]
    if len(node) != parts:
        raise ValueError(f"a list of {len(node)} adapters cannot be one of {parts}")
    return list(node)


def factors(node: Node) -> tuple[Tensor, Tensor]:
    """(down, up) whose product, up @ down, is what the node adds: scaling is in `up`, separate parts lie diagonally."""
    if isinstance(node, dict):
        return node["down"], node["up"] * scaling(node)
    ranks = [rank(part) if part else 0 for part in node]
    rows = members(node)[0]["up"].shape[0]
    ups, before = [], 0
    for part, own in zip(node, ranks, strict=True):
        up = part["up"] * scaling(part) if part else members(node)[0]["up"].new_zeros(rows, 0)
        ups.append(F.pad(up, (before, sum(ranks) - before - own)))
        before += own
    return torch.cat([part["down"] for part in members(node)]), torch.cat(ups)


def product(node: Node) -> Tensor:
    """What the node adds to its weight, (outputs, inputs, ...), in float32 at least."""
    if not isinstance(node, dict):
        some = product(members(node)[0])
        return torch.cat([product(part) if part else torch.zeros_like(some) for part in node])
    wide = torch.promote_types(node["down"].dtype, torch.float32)
    down, up = node["down"].to(wide), node["up"].to(wide)
    return ((up @ down.flatten(1)) * scaling(node).to(wide)).unflatten(1, down.shape[1:])


def check(path: str, node: Node, shape: tuple[int, ...]) -> list[str]:
    """What keeps a node from adapting a weight of this shape, one sentence each."""
    parts = 1 if isinstance(node, dict) else len(node)
    problems = []
    for part in members(node):
        down, up = tuple(part["down"].shape), tuple(part["up"].shape)
        if down[1:] != tuple(shape[1:]) or up[:1] != (shape[0] // parts,):
            problems.append(f"{path} is {list(shape)}; a LoRA of {_sizes(up[:1] + down[1:])} is for another model")
        elif up[1:] != down[:1] or not down[0]:
            problems.append(f"{path}: down {list(down)} and up {list(up)} must have one rank, at least 1")
    return problems


class _Leaf:
    """A node among branches, which are dicts too."""

    def __init__(self, node: Node) -> None:
        self.node = node


def _walk(path: str, tree: Tree) -> Iterator[tuple[str, Node]]:
    if _is_node(tree):
        yield path, tree
        return
    children = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for name, child in children:
        yield from _walk(f"{path}.{name}" if path else str(name), child)


def _is_node(tree: Tree) -> bool:
    if isinstance(tree, dict):
        return "down" in tree
    return isinstance(tree, (list, tuple)) and any(isinstance(part, dict) and "down" in part for part in tree)


def _settle(tree: Any) -> Tree:
    if isinstance(tree, _Leaf):
        return tree.node
    settled = {name: _settle(child) for name, child in tree.items()}
    if settled and all(name.isdecimal() for name in settled):
        return [settled.get(str(index), {}) for index in range(max(map(int, settled)) + 1)]
    return settled


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
