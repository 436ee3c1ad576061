"""Trees of tensors: nested dicts and lists, and tuples or NamedTuples of them for states.

Everything that is not a dict, a list or a tuple is a leaf. The path of a leaf is its names and positions joined by
dots, "blocks.3.attention.qkv.weight"; order is always that of insertion. Nothing here writes into its arguments.
`allclose` compares trees as `torch.allclose` does tensors, and `diff` lists what differs.
"""

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.tree_paths import NODES, child_names, children, join_path, walk
from functional_sd3.core.tree_paths import flatten_paths as flatten_paths
from functional_sd3.core.tree_paths import unflatten_paths as unflatten_paths
from functional_sd3.core.types import Tree

Chooser = str | Sequence[str] | Callable[[str, Any], bool]
"""A choice of leaves: a glob over whole paths (`*` crosses dots), several of them, or `(path, leaf) -> bool`."""


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:  # noqa: A001
    """The tree of `fn(leaf, *leaves of rest)`; dicts are matched by key.

    Raises ValueError naming the path where a tree of `rest` differs in structure.
    """
    try:
        return _map(fn, tree, rest)
    except _StructureError:
        raise ValueError(_first_mismatch("", tree, rest)) from None


def summary(tree: Tree, levels: int = 2) -> str:
    """A line for each part of a tree, `levels` names deep: path, tensors, elements, dtypes and devices.

    For notebooks, as the repr of a tree is all its numbers. `select` has the leaves themselves.
    """
    parts: dict[str, list[Any]] = {}
    for path, leaf in walk("", tree):
        parts.setdefault(".".join(path.split(".")[:levels]), []).append(leaf)
    rows = [("", "tensors", "elements", ""), *((name, *_totals(part)) for name, part in parts.items())]
    rows.append(("all", *_totals(leaves(tree))))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:{widths[0]}}  {tensors:>{widths[1]}}  {elements:>{widths[2]}}  {kinds}".rstrip()
        for name, tensors, elements, kinds in rows
    )


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """The tree of `fn(path, leaf, *leaves of rest)`; the rest as in `map`."""
    paths = iter([path for path, _ in walk("", tree)])
    return map(lambda *leaves: fn(next(paths), *leaves), tree, *rest)


def leaves(tree: Tree) -> list[Any]:
    """Every leaf, in order."""
    collected: list[Any] = []
    _gather(tree, collected)
    return collected


def select(tree: Tree, chooser: Chooser) -> dict[str, Any]:
    """The chosen leaves by dotted path, in order; {} where none is chosen.

    chooser: a glob over whole paths, such as "transformer.blocks.*.attention.*" or "*norm*" (`*` crosses dots), several
    of them, or a function `(path, leaf) -> bool`.
    """
    chosen = _predicate(chooser)
    return {path: leaf for path, leaf in walk("", tree) if chosen(path, leaf)}


def partition(tree: Tree, chooser: Chooser) -> tuple[Tree, Tree]:
    """(chosen, rest): each leaf is in one of the two trees; an empty dict holds its place in the other.

    chooser: as in `select`. Of one that chooses no leaf the first tree has none: `check_chosen` makes that an error.
    An empty dict has no leaves for `map`, `flatten_paths` and `torch.func`, so that either half can be differentiated
    or optimised alone, while list positions and the order of names survive for `combine`.
    """
    return _partition("", tree, _predicate(chooser))


def check_chosen(name: str, tree: Tree, chooser: Chooser) -> None:
    """Raises ValueError where `chooser`, the argument `name`, chooses no leaf of a tree."""
    paths = [path for path, _ in walk("", tree)]
    if select(tree, chooser) or not paths:
        return
    what = "the function" if callable(chooser) else repr(chooser)
    wider = f"*{chooser}*" if isinstance(chooser, str) else ""
    match = next((path for path in paths if wider and fnmatchcase(path, wider)), "")
    hint = f"{wider!r} chooses {match}, for one" if match else f"they are such as {paths[0]} and {paths[-1]}"
    raise ValueError(f"{name} {what} chooses no parameter; globs are compared with whole paths: {hint}")


def combine(first: Tree, second: Tree) -> Tree:
    """The inverse of `partition`: every leaf from whichever tree has it.

    Raises ValueError naming the path where both trees have a leaf or their outlines differ.
    """
    return _combine("", first, second)


def cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """Floating point leaves in `dtype`; integer leaves (counters, keys) as they are."""
    return map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tree)


def to(tree: Tree, device: torch.device | str) -> Tree:
    """Every leaf on `device`."""
    return map(lambda leaf: leaf.to(device), tree)


def count(tree: Tree) -> int:
    """Number of elements."""
    return sum(leaf.numel() for leaf in leaves(tree))


def nbytes(tree: Tree) -> int:
    """Bytes of all elements, shared storage counted each time."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(tree))


class Difference(NamedTuple):
    """One path at which two trees differ; `amount` is the largest absolute difference (infinite for all but values)."""

    path: str
    kind: str
    amount: float
    detail: str


def diff(first: Tree, second: Tree, rtol: float = 0.0, atol: float = 0.0) -> list[Difference]:
    """Differences of two trees, worst first: presence, shape, dtype, then values by their largest difference.

    A value differs when |first - second| > atol + rtol |second|; NaN equals NaN and infinity itself. Leaves of
    different dtypes have their values compared as well. Empty when the trees agree.
    """
    ours, theirs = flatten_paths(first), flatten_paths(second)
    only_first, only_second = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
    differences = [Difference(path, "presence", math.inf, "in the first tree only") for path in only_first]
    differences += [Difference(path, "presence", math.inf, "in the second tree only") for path in only_second]
    for path in ours.keys() & theirs.keys():
        differences += _compare(path, ours[path], theirs[path], rtol, atol)
    kinds = ("presence", "shape", "dtype", "value")
    return sorted(differences, key=lambda one: (kinds.index(one.kind), -one.amount, one.path))


def allclose(first: Tree, second: Tree, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
    """True if `diff` is empty: same paths, shapes and dtypes, values within atol + rtol |second|."""
    return not diff(first, second, rtol, atol)


class _StructureError(Exception):
    """Trees differ in structure; the path is determined only then, so that mapping pays nothing for paths."""


def _map(fn: Callable[..., Any], tree: Tree, rest: Sequence[Tree]) -> Tree:
    if isinstance(tree, dict):
        for other in rest:
            if not isinstance(other, dict) or other.keys() != tree.keys():
                raise _StructureError
        return {name: _map(fn, child, [other[name] for other in rest]) for name, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        for other in rest:
            if not isinstance(other, (list, tuple)) or len(other) != len(tree):
                raise _StructureError
        return _like(tree, [_map(fn, child, others) for child, *others in zip(tree, *rest, strict=True)])
    for other in rest:
        if isinstance(other, (dict, list, tuple)):
            raise _StructureError
    return fn(tree, *rest)


def _first_mismatch(path: str, tree: Tree, rest: Sequence[Tree]) -> str | None:
    for other in rest:
        if _outline(tree) != _outline(other):
            return _mismatch(path, tree, other)
    if isinstance(tree, dict):
        below = [(name, child, [other[name] for other in rest]) for name, child in tree.items()]
    elif isinstance(tree, (list, tuple)):
        others = [list(column) for column in zip(*rest, strict=True)]
        below = list(zip(child_names(tree), tree, others, strict=True))
    else:
        return None
    mismatches = (_first_mismatch(join_path(path, name), child, others) for name, child, others in below)
    return next(filter(None, mismatches), None)


def _gather(tree: Tree, leaves: list[Any]) -> None:
    if not isinstance(tree, NODES):
        leaves.append(tree)
        return
    for child in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(child, NODES):
            _gather(child, leaves)
        else:
            leaves.append(child)


def _partition(path: str, tree: Tree, is_chosen: Callable[[str, Any], bool]) -> tuple[Tree, Tree]:
    if not isinstance(tree, NODES):
        return (tree, {}) if is_chosen(path, tree) else ({}, tree)
    halves = [(name, *_partition(join_path(path, name), child, is_chosen)) for name, child in children(path, tree)]
    if isinstance(tree, dict):
        return {name: chosen for name, chosen, _ in halves}, {name: rest for name, _, rest in halves}
    return _like(tree, [chosen for _, chosen, _ in halves]), _like(tree, [rest for _, _, rest in halves])


def _combine(path: str, first: Tree, second: Tree) -> Tree:
    if isinstance(first, dict) and not first:
        return map(lambda leaf: leaf, second)
    if isinstance(second, dict) and not second:
        return map(lambda leaf: leaf, first)
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return {name: _combine(join_path(path, name), first[name], second[name]) for name in first}
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        columns = zip(child_names(first), first, second, strict=True)
        return _like(first, [_combine(join_path(path, name), one, other) for name, one, other in columns])
    if not isinstance(first, (dict, list, tuple)) and not isinstance(second, (dict, list, tuple)):
        raise ValueError(f"{path or 'the root'} is a leaf of both trees; combine takes halves without a common leaf")
    raise ValueError(_mismatch(path, first, second))


def _compare(path: str, ours: Tensor, theirs: Tensor, rtol: float, atol: float) -> list[Difference]:
    if ours.shape != theirs.shape:
        return [Difference(path, "shape", math.inf, f"{list(ours.shape)} against {list(theirs.shape)}")]
    differences = []
    if ours.dtype != theirs.dtype:
        differences.append(Difference(path, "dtype", math.inf, f"{ours.dtype} against {theirs.dtype}"))
    dtype = torch.promote_types(_at_least_float32(ours.dtype), _at_least_float32(theirs.dtype))
    ours, theirs = ours.detach().to(dtype), theirs.detach().to(theirs.device, dtype).to(ours.device)
    differs = ~torch.isclose(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
    if differs.any():
        gaps = (ours[differs].double() - theirs[differs].double()).abs()
        amount = float(gaps.nan_to_num(math.inf).max())
        detail = f"{int(differs.sum())} of {differs.numel()} elements differ, by at most {amount:.3g}"
        differences.append(Difference(path, "value", amount, detail))
    return differences


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    # By itemsize: torch.promote_types does not take float8.
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def _predicate(chooser: Chooser) -> Callable[[str, Any], bool]:
    if callable(chooser):
        return chooser
    globs = [chooser] if isinstance(chooser, str) else list(chooser)
    return lambda path, leaf: any(fnmatchcase(path, glob) for glob in globs)


def _totals(leaves: Sequence[Any]) -> tuple[str, str, str]:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    kinds = dict.fromkeys(f"{leaf.dtype} {leaf.device}".removeprefix("torch.") for leaf in tensors)
    return f"{len(tensors):,}", f"{sum(leaf.numel() for leaf in tensors):,}", ", ".join(kinds)


def _like(tree: Sequence[Any], children: list[Any]) -> Tree:
    if isinstance(tree, list):
        return children
    return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)


def _mismatch(path: str, ours: Tree, theirs: Tree) -> str:
    return f"trees differ at {path or 'the root'}: {_outline(ours)} against {_outline(theirs)}"


def _outline(tree: Tree) -> str:
    if isinstance(tree, dict):
        return f"a dict of {sorted(tree, key=str)}"
    if isinstance(tree, (list, tuple)):
        return f"a sequence of {len(tree)}"
    return "a leaf"
