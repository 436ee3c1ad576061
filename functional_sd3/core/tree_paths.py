"""Leaves of trees by their dotted paths: `tree.flatten_paths` and its inverse.

Dicts, lists and tuples are nodes; the path of a leaf is its names and positions joined by dots.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from functional_sd3.core.types import Tree

NODES = dict, list, tuple
"""Types of the nodes of trees; everything else is a leaf."""


def flatten_paths(tree: Tree) -> dict[str, Any]:
    """Every leaf by its dotted path. Empty dicts and lists hold no leaf and leave no trace.

    Raises ValueError for names that would make a path ambiguous: empty, not strings, or with a dot.
    """
    return dict(walk("", tree))


def unflatten_paths(flat: dict[str, Any]) -> Tree:
    """Nested dicts and lists from dotted paths: segments 0..n-1 become a list, whatever their order.

    The inverse of `flatten_paths` for trees of dicts and lists; states of tuples come back as lists, and of NamedTuples
    as dicts. Raises ValueError naming the path of a gap (`blocks.1 is missing`), of positions mixed with names, or of a
    leaf that is also a branch.
    """
    root = _Branch()
    for path, leaf in flat.items():
        *branches, name = segments = path.split(".")
        if "" in segments:
            raise ValueError(f"path {path!r} has an empty name in it")
        node = root
        for depth, branch in enumerate(branches):
            node = node.setdefault(branch, _Branch())
            if not isinstance(node, _Branch):
                raise ValueError(f"{'.'.join(branches[: depth + 1])} is both a leaf and the parent of {path}")
        if name in node:
            raise ValueError(f"{path} is both a leaf and the parent of other leaves")
        node[name] = leaf
    return _branches_to_lists(root, "")


def walk(path: str, tree: Tree) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf of a tree that is at `path`, "" for the root."""
    leaves: list[tuple[str, Any]] = []
    _collect(path, tree, leaves)
    return leaves


def _collect(path: str, tree: Tree, leaves: list[tuple[str, Any]]) -> None:
    # One list for the whole tree: nested generators would pass every leaf through every level.
    if not isinstance(tree, NODES):
        leaves.append((path, tree))
        return
    prefix = f"{path}." if path else ""
    for name, child in children(path, tree):
        if isinstance(child, NODES):
            _collect(prefix + name, child, leaves)
        else:
            leaves.append((prefix + name, child))


def children(path: str, tree: Tree) -> Iterable[tuple[str, Any]]:
    """(name, child) of a node at `path`. Raises ValueError for a name that would make a path ambiguous."""
    if not isinstance(tree, dict):
        return zip(child_names(tree), tree, strict=True)
    for name in tree:
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"name {name!r} in {path or 'the root'} must be a non-empty string without dots")
    return tree.items()


class _Branch(dict):
    """A node under construction, to distinguish it from a leaf that is a dict."""


def _branches_to_lists(node: Any, path: str) -> Tree:
    """The tree of a `_Branch`: branches whose names are 0..n-1 become lists, others dicts."""
    if not isinstance(node, _Branch):
        return node
    below = {name: _branches_to_lists(child, join_path(path, name)) for name, child in node.items()}
    named = [name for name in below if not _is_position(name)]
    if len(named) == len(below):
        return below
    if named:
        raise ValueError(f"{path or 'the root'} mixes positions with the name {named[0]!r}")
    for index in range(len(below)):
        if str(index) not in below:
            last = max(int(name) for name in below)
            raise ValueError(f"{join_path(path, str(index))} is missing: {path or 'the root'} goes up to {last}")
    return [below[str(index)] for index in range(len(below))]


def _is_position(name: str) -> bool:
    return name.isascii() and name.isdecimal() and (name == "0" or name[0] != "0")


def child_names(tree: Sequence[Any]) -> Sequence[str]:
    """The names of the children of a list or tuple: a NamedTuple's fields, else positions."""
    return getattr(tree, "_fields", None) or [str(index) for index in range(len(tree))]


def join_path(path: str, name: str) -> str:
    """The path of the child `name` of what is at `path`."""
    return f"{path}.{name}" if path else str(name)
