"""Arithmetic of checkpoints: several fine-tunings of one model are merged, and two are compared.

All functions are pure and take trees of one structure; the result has the dtypes of the first. Sums are taken in the
next wider dtype and rounded once, so what is equal everywhere stays equal to the bit. The weights may be tensors: a
soup can be differentiated by its mixture.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import blend, tree
from functional_sd3.core.types import Params

_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}

Weight = float | Tensor


def average(trees: Sequence[Params], weights: Sequence[Weight] | None = None) -> Params:
    """sum_i w_i theta_i / sum_i w_i, equal weights by default (Wortsman et al. 2022, "Model soups").

    Raises ValueError for no trees, another number of weights, or weights whose sum is zero.
    """
    weights = _weights(trees, weights)
    total = sum(weights)
    if not isinstance(total, Tensor) and total == 0:
        raise ValueError(f"weights {list(weights)} sum to zero")
    return _moved(trees[0], trees[1:], lambda first, changes: sum(
        change * (weight / total) for change, weight in zip(changes, weights[1:], strict=True)
    ))  # fmt: skip


def slerp(first: Params, second: Params, t: Weight) -> Params:
    """Spherical interpolation (`blend.slerp`) of every leaf as a vector: `first` for t = 0, `second` for t = 1."""

    def between(one: Tensor, other: Tensor) -> Tensor:
        wide = _wider(one)
        return blend.slerp(one.to(wide)[None], other.to(one.device, wide)[None], t)[0].to(one.dtype)

    return tree.map(between, first, second)


def task_arithmetic(base: Params, tuned: Sequence[Params], weights: Sequence[Weight] | None = None) -> Params:
    """base + sum_i w_i (tuned_i - base), weights 1 by default; a negative one forgets what the fine-tuning taught.

    Ilharco et al. 2023, "Editing models with task arithmetic".
    """
    weights = _weights(tuned, weights)
    return _moved(base, tuned, lambda first, changes: sum(
        change * weight for change, weight in zip(changes, weights, strict=True)
    ))  # fmt: skip


def ties(base: Params, tuned: Sequence[Params], *, density: float = 0.2, weight: Weight = 1.0) -> Params:
    """TIES merging (Yadav et al. 2023, "Resolving Interference When Merging Models", algorithm 1).

    Of each fine-tuning's change the share `density` of the largest entries is kept, over the whole tree; every entry's
    sign is the one with more mass behind it; those that agree with it are averaged; `weight` (lambda) of that is added.
    Raises ValueError for a density that is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density {density} must be above 0 and at most 1")
    _weights(tuned, None)
    least = [_threshold(base, one, density) for one in tuned]

    def elected(first: Tensor, changes: Sequence[Tensor]) -> Tensor:
        trimmed = torch.stack([
            torch.where(change.float().abs() >= bound, change, 0.0)
            for change, bound in zip(changes, least, strict=True)
        ])  # fmt: skip
        agrees = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
        return weight * (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)

    return _moved(base, tuned, elected)


class Change(NamedTuple):
    """Difference between one part of two trees.

    relative: |second - first| / |first| in the Frobenius norm; largest: absolute difference of one number; changed and
    parameters: how many numbers differ, of how many.
    """

    path: str
    relative: float
    largest: float
    changed: int
    parameters: int


def diff(first: Params, second: Params, *, group: Callable[[str], str] | None = None) -> list[Change]:
    """Differences between two checkpoints, in the order of the tree: one row for every path that `group` gives.

    group: leaf path -> path of its row, by default `layer`. Raises ValueError where the trees differ in structure.
    """
    sums: dict[str, list[float]] = {}

    def add(path: str, one: Tensor, other: Tensor) -> None:
        if one.shape != other.shape:
            raise ValueError(f"{path} is {list(one.shape)} in the first, {list(other.shape)} in the second")
        before = one.detach().float()
        change = other.detach().to(one.device).float() - before
        row = sums.setdefault((group or layer)(path), [0.0, 0.0, 0.0, 0, 0])
        row[0] += float(torch.linalg.vector_norm(change)) ** 2
        row[1] += float(torch.linalg.vector_norm(before)) ** 2
        row[2] = max(row[2], float(change.abs().max().nan_to_num(math.inf))) if change.numel() else row[2]
        row[3] += int((change != 0).sum())
        row[4] += change.numel()

    tree.map_with_path(add, first, second)
    return [
        Change(path, _quotient(math.sqrt(change), math.sqrt(before)), largest, int(changed), int(count))
        for path, (change, before, largest, changed, count) in sums.items()
    ]


def component(path: str) -> str:
    """The first name of a path: what a row of `diff` for a whole component is about."""
    return path.partition(".")[0]


def layer(path: str) -> str:
    """The path up to its first position in a list ("transformer.blocks.3"), or else without the name of the leaf."""
    names = path.split(".")
    first = next((index for index, name in enumerate(names) if name.isdecimal()), None)
    return ".".join(names[: first + 1] if first is not None else names[:-1] or names)


def _weights(trees: Sequence[Params], weights: Sequence[Weight] | None) -> Sequence[Weight]:
    if not trees:
        raise ValueError("merging needs at least one tree")
    if weights is not None and len(weights) != len(trees):
        raise ValueError(f"{len(weights)} weights do not fit {len(trees)} trees")
    return [1.0] * len(trees) if weights is None else weights


def _moved(base: Params, others: Sequence[Params], step: Callable[[Tensor, Sequence[Tensor]], Any]) -> Params:
    """base + step(base, what the others differ by), leaf by leaf."""

    def leaf(first: Tensor, *rest: Tensor) -> Tensor:
        wide = _wider(first)
        start = first.to(wide)
        return (start + step(start, [other.to(first.device, wide) - start for other in rest])).to(first.dtype)

    return tree.map(leaf, base, *others)


def _wider(leaf: Tensor) -> torch.dtype:
    # Apple's GPUs have no float64.
    widest = torch.float32 if leaf.device.type == "mps" else torch.float64
    return min(_WIDER.get(leaf.dtype, leaf.dtype), widest, key=lambda dtype: dtype.itemsize)


def _threshold(base: Params, tuned: Params, density: float) -> float:
    """The smallest magnitude among the share `density` of the largest entries of tuned - base.

    By counting: the bits of positive floats are in their order, so two histograms, of the upper and of the lower half
    of the bits, find the exact value without a copy of the tree.
    """

    pairs: list[tuple[Tensor, Tensor]] = []
    tree.map(lambda one, other: pairs.append((one, other)), base, tuned)

    def magnitudes() -> Iterator[Tensor]:
        for one, other in pairs:
            yield (other.to(one.device).float() - one.float()).abs().flatten().view(torch.int32)

    def highest(counts: Tensor, wanted: int) -> tuple[int, int]:
        """(the bucket in which the wanted-th from above lies, how many of it are wanted)."""
        above = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(above, wanted))
        return len(counts) - 1 - place, wanted - (int(above[place - 1]) if place else 0)

    wanted = max(1, math.ceil(density * tree.count(base)))
    high, rest = highest(_total(torch.bincount(bits >> 16, minlength=2**15) for bits in magnitudes()), wanted)
    matching = (bits[bits >> 16 == high] & 0xFFFF for bits in magnitudes())
    low, _ = highest(_total(torch.bincount(bits, minlength=2**16) for bits in matching), rest)
    return float(torch.tensor(high << 16 | low, dtype=torch.int32, device="cpu").view(torch.float32))


def _total(counts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, (each.cpu() for each in counts))


def _quotient(change: float, before: float) -> float:
    return change / before if before else (math.inf if change else 0.0)
