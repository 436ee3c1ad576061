"""A LoRA as a tree of adapters, by the paths of the weights they adapt.

An adapter describes the change of one weight W (outputs, inputs, ...). It is one of four kinds:

- {"down": (rank, inputs, ...), "up": (outputs, rank), "alpha": ()} adds alpha / rank * up @ down (Hu et al. 2021,
  "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1).
- {"w1_a", "w1_b", "w2_a", "w2_b", "scale"} adds scale * (w1_a @ w1_b) * (w2_a @ w2_b), entry by entry: LoHa (Hyeon-Woo
  et al. 2021, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning").
- {"left": (a, b), "right": (c, d, ...), "scale": ()} adds scale * kron(left, right): LoKr (Yeh et al. 2023, "Navigating
  Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation").
- {"diff": as W} adds that; the only kind for biases and norms.

With "magnitude", (outputs, 1, ...) or (1, inputs, 1, ...), beside one of these, the changed weight is scaled so that
its rows, or columns, have these norms: DoRA (Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5).

Where a weight of ours is several matrices of a file one below the other (query, key and value), its place holds one
adapter over all of them, or a list with one for each, {} for those that are left alone. Lists of blocks hold {} for
blocks that are left alone.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core.types import Tree

Adapter = dict[str, Tensor]
LoraEntry = Any
"""Value at the path of one weight: an adapter, or a list of adapters and {}."""

Lora = Tree
"""Nested dicts and lists with an entry at the path of every adapted weight."""

_MARKS = ("down", "w1_a", "left", "diff")
"""One name of each kind, by which an adapter is recognised among the branches of a tree."""


def entries(lora: Lora) -> dict[str, LoraEntry]:
    """Every entry by the path of the weight it adapts ("transformer.blocks.0.image.attention.qkv.weight")."""
    return dict(_walk("", lora))


def build(by_path: Mapping[str, LoraEntry]) -> Lora:
    """The tree of entries by path; the inverse of `entries`."""
    root: dict[str, Any] = {}
    for path, entry in by_path.items():
        *branches, name = path.split(".")
        place = root
        for branch in branches:
            place = place.setdefault(branch, {})
        place[name] = _Leaf(entry)
    return _settle(root)


def rank(adapter: Adapter) -> int:
    """The rank of a low-rank adapter."""
    return adapter["down"].shape[0]


def scaling(adapter: Adapter) -> Tensor:
    """alpha / rank of a low-rank adapter, ()."""
    return adapter["alpha"] / rank(adapter)


def members(entry: LoraEntry) -> list[Adapter]:
    """The adapters of an entry, one or several."""
    return [entry] if isinstance(entry, dict) else [part for part in entry if part]


def is_low_rank(entry: LoraEntry) -> bool:
    """True if the entry is a plain LoRA, whose factors a layer can apply beside its weight."""
    return all("down" in part and "magnitude" not in part for part in members(entry))


def has_magnitude(entry: LoraEntry) -> bool:
    """True if what the entry adds depends on the weight (DoRA)."""
    return any("magnitude" in part for part in members(entry))


def separate(entry: LoraEntry, parts: int) -> list[Adapter]:
    """The low-rank entry as a list of `parts`: an adapter over all gives each the same `down` and a part of its `up`.

    Raises ValueError when the entry is of another number of parts.
    """
    if isinstance(entry, dict):
        return [{**entry, "up": up} for up in entry["up"].chunk(parts)]
    if len(entry) != parts:
        raise ValueError(f"a list of {len(entry)} adapters cannot be one of {parts}")
    return list(entry)


def factors(entry: LoraEntry) -> tuple[Tensor, Tensor]:
    """(down, up) of a low-rank entry, whose product, up @ down, is what it adds: scaling is in `up`, separate parts lie
    diagonally."""
    if isinstance(entry, dict):
        return entry["down"], entry["up"] * scaling(entry)
    ranks = [rank(part) if part else 0 for part in entry]
    rows = members(entry)[0]["up"].shape[0]
    ups, before = [], 0
    for part, own in zip(entry, ranks, strict=True):
        up = part["up"] * scaling(part) if part else members(entry)[0]["up"].new_zeros(rows, 0)
        ups.append(F.pad(up, (before, sum(ranks) - before - own)))
        before += own
    return torch.cat([part["down"] for part in members(entry)]), torch.cat(ups)


def product(entry: LoraEntry) -> Tensor:
    """Sum that an entry without magnitudes adds to its weight, (outputs, inputs, ...), in float32 at least."""
    if not isinstance(entry, dict):
        some = product(members(entry)[0])
        return torch.cat([product(part) if part else torch.zeros_like(some) for part in entry])
    if has_magnitude(entry):
        raise ValueError("what a DoRA adds depends on the weight: apply it to the weights it was trained on")
    return _sum(entry)


def change(entry: LoraEntry, weight: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """`scale` times the difference that the entry makes to `weight`, (outputs, inputs, ...), in float32 at least.

    Of a DoRA it is the whole difference that is scaled, so that 0 is the weight itself and 1 what was trained.
    """
    if not isinstance(entry, dict):
        rows = weight.chunk(len(entry))
        return torch.cat([change(part, own, scale) if part else torch.zeros_like(own, dtype=_wide(own))
                          for part, own in zip(entry, rows, strict=True)])  # fmt: skip
    if not has_magnitude(entry):
        return product(entry) * scale
    before = weight.to(_wide(weight))
    after = before + _sum(entry)
    by_row = entry["magnitude"].shape[0] == weight.shape[0]
    others = [axis for axis in range(weight.ndim) if axis != (0 if by_row else 1)]
    norms = torch.linalg.vector_norm(after, dim=others, keepdim=True).clamp_min(torch.finfo(after.dtype).tiny)
    return (after * (entry["magnitude"].to(after.dtype) / norms) - before) * scale


def reordered(adapter: Adapter, rows: Callable[[Tensor], Tensor]) -> Adapter:
    """The adapter of the weight whose rows `rows` (tensor -> tensor of the same shape) puts into another order."""
    if "down" in adapter:
        changed = {"up": rows(adapter["up"])}
    elif "w1_a" in adapter:
        changed = {name: rows(adapter[name]) for name in ("w1_a", "w2_a")}
    else:
        adapter = {"diff": _sum(adapter), **({"magnitude": adapter["magnitude"]} if has_magnitude(adapter) else {})}
        changed = {"diff": rows(adapter["diff"])}
    if "magnitude" in adapter and adapter["magnitude"].shape[0] > 1:
        changed["magnitude"] = rows(adapter["magnitude"])
    return {**adapter, **changed}


def shape(adapter: Adapter) -> tuple[int, ...]:
    """(outputs, inputs, ...) of the weight that an adapter fits."""
    if "down" in adapter:
        return (*adapter["up"].shape[:1], *adapter["down"].shape[1:])
    if "w1_a" in adapter:
        return (adapter["w1_a"].shape[0], *adapter["w1_b"].shape[1:])
    if "left" in adapter:
        (rows, columns), (below, beside, *kernel) = adapter["left"].shape, adapter["right"].shape
        return (rows * below, columns * beside, *kernel)
    return tuple(adapter["diff"].shape)


def check(path: str, entry: LoraEntry, shape_of_weight: tuple[int, ...]) -> list[str]:
    """Mismatches between an entry and a weight of this shape, one sentence each."""
    parts = 1 if isinstance(entry, dict) else len(entry)
    wanted = (shape_of_weight[0] // parts, *shape_of_weight[1:])
    problems = []
    for part in members(entry):
        if "down" in part and (part["up"].shape[1:] != part["down"].shape[:1] or not part["down"].shape[0]):
            down, up = list(part["down"].shape), list(part["up"].shape)
            problems.append(f"{path}: down {down} and up {up} must have one rank, at least 1")
        elif shape(part) != wanted:
            sizes = " x ".join(map(str, shape(part)))
            problems.append(f"{path} is {list(shape_of_weight)}; a LoRA of {sizes} is for another model")
    return problems


def _sum(adapter: Adapter) -> Tensor:
    """Product of the adapter before any magnitude."""
    if "down" in adapter:
        wide = _wide(adapter["down"])
        down, up = adapter["down"].to(wide), adapter["up"].to(wide)
        return ((up @ down.flatten(1)) * scaling(adapter).to(wide)).unflatten(1, down.shape[1:])
    if "w1_a" in adapter:
        wide = _wide(adapter["w1_a"])
        first, second = (
            (adapter[f"{name}_a"].to(wide) @ adapter[f"{name}_b"].to(wide).flatten(1)) for name in ("w1", "w2")
        )
        return (first * second * adapter["scale"].to(wide)).unflatten(1, adapter["w1_b"].shape[1:])
    if "left" in adapter:
        wide = _wide(adapter["left"])
        left, right = adapter["left"].to(wide) * adapter["scale"].to(wide), adapter["right"].to(wide)
        return torch.kron(left.reshape(*left.shape, *[1] * (right.ndim - 2)), right.contiguous())
    return adapter["diff"].to(_wide(adapter["diff"]))


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


class _Leaf:
    """A entry among branches, which are dicts too."""

    def __init__(self, entry: LoraEntry) -> None:
        self.entry = entry


def _walk(path: str, tree: Tree) -> Iterator[tuple[str, LoraEntry]]:
    if _is_node(tree):
        yield path, tree
        return
    children = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for name, child in children:
        yield from _walk(f"{path}.{name}" if path else str(name), child)


def _is_node(tree: Tree) -> bool:
    if isinstance(tree, dict):
        return any(mark in tree for mark in _MARKS)
    return isinstance(tree, (list, tuple)) and any(isinstance(part, dict) and _is_node(part) for part in tree)


def _settle(tree: Any) -> Tree:
    if isinstance(tree, _Leaf):
        return tree.entry
    settled = {name: _settle(child) for name, child in tree.items()}
    if settled and all(name.isdecimal() for name in settled):
        return [settled.get(str(index), {}) for index in range(max(map(int, settled)) + 1)]
    return settled
