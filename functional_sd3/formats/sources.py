"""Origin of every leaf of a parameter tree in files: names there, and the transform between their tensors and the leaf.

`layouts.rules` makes sources from tables of names; `formats.trees` checks and reads trees by them.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core import spec as specs
from functional_sd3.core.types import Tree

# Above this many missing names a file is another model's: comparing it name by name would take minutes.
_MAX_COMPARED = 100
_MAX_ADVISED = 20


class Transform(NamedTuple):
    """`join`: their tensors -> ours; `split`: ours, and how many of theirs -> theirs. Each undoes the other exactly.

    by_rows: every row of theirs is a row of ours, so that `join` and `split` do to a scale a row what they do to rows.
    pieces: views of theirs of which `join` is the concatenation, where it is one: they can be copied straight into a
    leaf of another dtype.
    """

    name: str
    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor, int], list[Tensor]]
    by_rows: bool = False
    pieces: Callable[[list[Tensor]], list[Tensor]] | None = None


class Source(NamedTuple):
    """Origin of one leaf of ours: names and transform; for a leaf of a spec also its Param, the shapes of theirs, and
    the function that makes a leaf which files may lack."""

    names: tuple[str, ...]
    transform: Transform
    path: str
    param: specs.Param | None = None
    shapes: tuple[tuple[int, ...], ...] = ()
    default: Callable[[], Tensor] | None = None


Sources = dict[str, Source]
"""Our paths -> where they come from."""


# Of meta tensors only shapes are needed, and torch's own `cat` of them imports its compiler: seconds, and 70 MiB.
def _fuse(parts: list[Tensor]) -> Tensor:
    if not parts[0].is_meta:
        return torch.cat(parts)
    if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
        raise RuntimeError("tensors of different widths cannot be put one below the other")
    return parts[0].new_empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]))


IDENTITY = Transform("identity", lambda parts: parts[0], lambda ours, count: [ours], by_rows=True)
FUSE = Transform("fuse", _fuse, lambda ours, count: list(ours.chunk(count)), by_rows=True, pieces=lambda parts: parts)
"""Several of theirs one below the other (query, key and value of one attention)."""


def described(source: Source, param: specs.Param, default: Callable[[], Tensor] | None = None) -> Source:
    """The source of a leaf of a spec. default: of a leaf that is learned; others are made by their initialisers."""
    if not param.trainable:
        default = lambda: param.init(prng.key(0), param.shape)  # noqa: E731
    if source.transform is IDENTITY:
        return source._replace(param=param, shapes=(param.shape,), default=default)
    parts = source.transform.split(torch.empty(param.shape, device="meta", dtype=torch.float32), len(source.names))
    return source._replace(param=param, shapes=tuple(tuple(part.shape) for part in parts), default=default)


def own_names(spec: Tree) -> Sources:
    """Sources of a tree in a file whose names are the paths of its leaves."""
    return {path: described(Source((path,), IDENTITY, path), param) for path, param in specs.paths(spec).items()}


def shapes_of(sources: Sources) -> dict[str, tuple[int, ...]]:
    """Their names -> shapes, of the sources of a spec."""
    return {name: shape for source in sources.values() for name, shape in zip(source.names, source.shapes, strict=True)}


def check(sources: Sources, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Mismatches between tensors of theirs (proper name -> shape) and the sources of a spec, one sentence each.

    A leaf that has a default may be missing.
    """
    wanted = shapes_of(sources)
    unexpected = [name for name in shapes if name not in wanted]
    needed = [source for source in sources.values() if source.default is None]
    missing = [name for source in needed for name in source.names if name not in shapes]
    problems = [f"{name} is missing (shape {list(wanted[name])})" for name in missing]
    # Only the first are shown, and a comparison takes a tenth of a millisecond.
    problems += [
        f"{name} is unexpected{_closest(name, missing) if index < _MAX_ADVISED else ''}"
        for index, name in enumerate(unexpected)
    ]
    for name, shape in wanted.items():
        if name in shapes and tuple(shapes[name]) != shape:
            problems.append(f"{name} has shape {list(shapes[name])}, expected {list(shape)}")
    return problems


def _closest(name: str, missing: list[str]) -> str:
    near = difflib.get_close_matches(name, missing, n=1, cutoff=0.8) if len(missing) <= _MAX_COMPARED else []
    return f"; is it {near[0]}?" if near else ""
