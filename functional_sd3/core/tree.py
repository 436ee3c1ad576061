"""Trees of tensors: nested dicts and lists, and tuples or NamedTuples of them for states.

Everything that is not a dict, a list or a tuple is a leaf. The path of a leaf is its names and positions joined by dots,
"blocks.3.attention.qkv.weight"; order is always the order of insertion. Nothing here writes into its arguments.
"""

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.types import Tree

Chooser = str | Sequence[str] | Callable[[str, Any], bool]
"""Which leaves: a glob over whole paths (`*` crosses dots), several of them, or `(path, leaf) -> bool`."""


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:  # noqa: A001
    """The tree of `fn(leaf, *leaves of rest)`; dicts are matched by key.

    Raises ValueError naming the path where a tree of `rest` differs in structure.
    """
    return _map(lambda path, *leaves: fn(*leaves), "", tree, rest)


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """As `map`, of `fn(path, leaf, *leaves of rest)`."""
    return _map(fn, "", tree, rest)


def leaves(tree: Tree) -> list[Any]:
    """Every leaf, in order."""
    return [leaf for _, leaf in _walk("", tree)]


def flatten_paths(tree: Tree) -> dict[str, Any]:
    """Every leaf by its dotted path. Empty dicts and lists hold no leaf and leave no trace.

    Raises ValueError for names that would make a path ambiguous: empty, not strings, or with a dot.
    """
    return dict(_walk("", tree))


def unflatten_paths(flat: dict[str, Any]) -> Tree:
    """Nested dicts and lists from dotted paths: segments 0..n-1 become a list, whatever their order.

    Raises ValueError naming the path of a gap (`blocks.1 is missing`), of positions mixed with names, or of a leaf that is
    also a branch.
    """
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *branches, name = path.split(".")
        node = root
        for depth, branch in enumerate(branches):
            node = node.setdefault(branch, _Branch())
            if not isinstance(node, _Branch):
                raise ValueError(f"{'.'.join(branches[: depth + 1])} is both a leaf and the parent of {path}")
        if name in node:
            raise ValueError(f"{path} is both a leaf and the parent of other leaves")
        node[name] = leaf
    return _settle(root, "")


def select(tree: Tree, chooser: Chooser) -> dict[str, Any]:
    """The chosen leaves by path: what `flatten_paths` gives, less the rest."""
    chosen = _predicate(chooser)
    return {path: leaf for path, leaf in _walk("", tree) if chosen(path, leaf)}


def partition(tree: Tree, chooser: Chooser) -> tuple[Tree, Tree]:
    """(chosen, rest): two trees of the same outline; a leaf is in one of them, and an empty dict holds its place in the other.

    An empty dict has no leaves for `map`, `flatten_paths` and `torch.func`, so either half can be differentiated, saved or
    optimised alone, while list positions and the order of names survive for `combine`.
    """
    chosen = _predicate(chooser)
    flags = map_with_path(lambda path, leaf: bool(chosen(path, leaf)), tree)
    return map(lambda leaf, flag: leaf if flag else {}, tree, flags), map(
        lambda leaf, flag: {} if flag else leaf, tree, flags
    )


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
    """What differs, worst first: presence, shape, dtype (values are compared still), then values by their largest difference.

    A value differs when |first - second| > atol + rtol |second|; NaN equals NaN and infinity itself. Empty when the trees agree.
    """
    ours, theirs = flatten_paths(first), flatten_paths(second)
    found = [Difference(path, "presence", float("inf"), "only in the first tree") for path in ours if path not in theirs]
    found += [Difference(path, "presence", float("inf"), "only in the second tree") for path in theirs if path not in ours]
    for path in ours:
        if path in theirs:
            found += _compare(path, ours[path], theirs[path], rtol, atol)
    kinds = ("presence", "shape", "dtype", "value")
    return sorted(found, key=lambda difference: (kinds.index(difference.kind), -difference.amount))


def allclose(first: Tree, second: Tree, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
    """Whether `diff` finds nothing: same paths, shapes and dtypes, values within atol + rtol |second|."""
    return not diff(first, second, rtol, atol)


def _map(fn: Callable[..., Any], path: str, tree: Tree, rest: tuple[Tree, ...]) -> Tree:
    if isinstance(tree, dict):
        for other in rest:
            if not isinstance(other, dict) or other.keys() != tree.keys():
                raise ValueError(_mismatch(path, tree, other))
        return {
            name: _map(fn, _join(path, name), child, tuple([other[name] for other in rest]))
            for name, child in tree.items()
        }
    if isinstance(tree, list | tuple):
        for other in rest:
            if not isinstance(other, list | tuple) or len(other) != len(tree):
                raise ValueError(_mismatch(path, tree, other))
        names = _names(tree)
        children = [_map(fn, _join(path, names[i]), tree[i], tuple([other[i] for other in rest])) for i in range(len(tree))]
        return _like(tree, children)
    for other in rest:
        if isinstance(other, dict | list | tuple):
            raise ValueError(_mismatch(path, tree, other))
    return fn(path, tree, *rest)


def _walk(path: str, tree: Tree) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name, child in tree.items():
            if not isinstance(name, str) or not name or "." in name:
                raise ValueError(f"name {name!r} in {path or 'the root'} must be a non-empty string without dots")
            yield from _walk(_join(path, name), child)
    elif isinstance(tree, list | tuple):
        for name, child in zip(_names(tree), tree, strict=True):
            yield from _walk(_join(path, name), child)
    else:
        yield path, tree


class _Branch(dict):
    """A node being unflattened, told from a leaf that happens to be a dict."""


def _settle(node: Any, path: str) -> Tree:
    if not isinstance(node, dict):
        return node
    children = {name: _settle(child, _join(path, name)) if isinstance(child, _Branch) else child for name, child in node.items()}
    positions = {int(name): child for name, child in children.items() if name.isdecimal() and str(int(name)) == name}
    if not positions:
        return children
    if len(positions) != len(children):
        strange = next(name for name in children if not name.isdecimal() or str(int(name)) != name)
        raise ValueError(f"{path or 'the root'} mixes positions with the name {strange!r}")
    for index in range(len(positions)):
        if index not in positions:
            raise ValueError(f"{_join(path, str(index))} is missing: {path or 'the root'} goes up to {max(positions)}")
    return [positions[index] for index in range(len(positions))]


def _combine(path: str, first: Tree, second: Tree) -> Tree:
    if isinstance(first, dict) and not first and not isinstance(second, list | tuple):
        return map(lambda leaf: leaf, second)
    if isinstance(second, dict) and not second and not isinstance(first, list | tuple):
        return map(lambda leaf: leaf, first)
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return {name: _combine(_join(path, name), first[name], second[name]) for name in first}
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        names = _names(first)
        return _like(first, [_combine(_join(path, names[i]), first[i], second[i]) for i in range(len(first))])
    if not isinstance(first, dict | list | tuple) and not isinstance(second, dict | list | tuple):
        raise ValueError(f"{path or 'the root'} is a leaf of both trees; combine takes two halves without a common leaf")
    raise ValueError(_mismatch(path, first, second))


def _compare(path: str, ours: Tensor, theirs: Tensor, rtol: float, atol: float) -> list[Difference]:
    if ours.shape != theirs.shape:
        return [Difference(path, "shape", float("inf"), f"{list(ours.shape)} against {list(theirs.shape)}")]
    found = []
    if ours.dtype != theirs.dtype:
        found.append(Difference(path, "dtype", float("inf"), f"{ours.dtype} against {theirs.dtype}"))
    wide = torch.promote_types(ours.dtype, theirs.dtype)
    if wide.is_floating_point:
        wide = torch.promote_types(wide, torch.float32)
    ours, theirs = ours.detach().to(wide), theirs.detach().to(theirs.device, wide).to(ours.device)
    off = ~torch.isclose(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
    if off.any():
        gaps = (ours[off].double() - theirs[off].double()).abs()
        amount = float(gaps.nan_to_num(float("inf")).max())
        detail = f"{int(off.sum())} of {off.numel()} elements differ, by at most {amount:.3g}"
        found.append(Difference(path, "value", amount, detail))
    return found


def _predicate(chooser: Chooser) -> Callable[[str, Any], bool]:
    if callable(chooser):
        return chooser
    globs = [chooser] if isinstance(chooser, str) else list(chooser)
    return lambda path, leaf: any(fnmatchcase(path, glob) for glob in globs)


def _names(tree: Sequence[Any]) -> Sequence[str]:
    return getattr(tree, "_fields", None) or [str(index) for index in range(len(tree))]


def _like(tree: Sequence[Any], children: list[Any]) -> Tree:
    if isinstance(tree, list):
        return children
    return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else str(name)


def _mismatch(path: str, ours: Tree, theirs: Tree) -> str:
    return f"trees differ at {path or 'the root'}: {_outline(ours)} against {_outline(theirs)}"


def _outline(tree: Tree) -> str:
    if isinstance(tree, dict):
        return f"a dict of {sorted(tree, key=str)}"
    if isinstance(tree, list | tuple):
        return f"a {type(tree).__name__} of {len(tree)}"
    return "a leaf"
