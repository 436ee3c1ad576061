"""Foreign checkpoints as data: a table of rules between their names and ours, read in both directions.

A rule pairs a pattern of ours with one or more of theirs and a transform with an exact inverse. `{i}` stands for one
part of a name between dots, `{*rest}` for any number of them; what they match on one side is filled in on the other.
For every leaf of a spec the first rule that matches counts, so exceptions precede the rules that they are exceptions
to. From the one table come the names and shapes a file must have, the parameters read from it and the tensors written.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import spec as specs
from functional_sd3.core.types import Params, Tree
from functional_sd3.formats.sources import IDENTITY, Source, Sources, Transform, described, shapes_of


def _only(change: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], name: str) -> Transform:
    return Transform(name, lambda parts: change(parts[0]), lambda ours, count: [back(ours)])


def swap_halves(value: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    return value if value.is_meta else torch.cat(value.chunk(2)[::-1])


SWAP_HALVES = _only(swap_halves, swap_halves, "swap halves")._replace(
    by_rows=True, pieces=lambda parts: list(parts[0].chunk(2))[::-1]
)
"""Shift and scale in the other order."""
FROM_CONV = _only(lambda value: value[:, :, 0, 0], lambda value: value[:, :, None, None], "1x1 convolution to linear")
TRANSPOSE = _only(lambda value: value.T, lambda value: value.T, "transpose")


def then(each: Transform, whole: Transform) -> Transform:
    """`each` on every one of their tensors, then `whole` on all of them."""
    return Transform(
        f"{each.name}, then {whole.name}",
        lambda parts: whole.join([each.join([part]) for part in parts]),
        lambda ours, count: [each.split(part, 1)[0] for part in whole.split(ours, count)],
    )


class Rule(NamedTuple):
    """`ours` comes from `theirs` by `transform`. unless: a path of ours; the rule is only for trees without it."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = IDENTITY
    unless: str = ""


class Default(NamedTuple):
    """A leaf of ours that files may lack: `make(shape)` is what it then is, where `fits(shape)`."""

    ours: str
    fits: Callable[[tuple[int, ...]], bool]
    make: Callable[[tuple[int, ...]], Tensor]


class Layout(NamedTuple):
    """Rules for every leaf of a component; other spellings met in files; names that hold nothing to load; leaves that
    files may lack; second names, (proper, second), under which a tensor is written once more."""

    rules: tuple[Rule, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    defaults: tuple[Default, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()


def renamed(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    """Rules (ours, theirs) that change nothing but the name."""
    return tuple(Rule(ours, (theirs,)) for ours, theirs in pairs)


def prefixed(layout: Layout, prefix: str) -> Layout:
    """The same layout with `prefix` before every name of theirs."""
    return Layout(
        tuple(rule._replace(theirs=tuple(prefix + name for name in rule.theirs)) for rule in layout.rules),
        tuple((prefix + alias, prefix + proper) for alias, proper in layout.aliases),
        tuple(prefix + name for name in layout.ignored),
        layout.defaults,
        tuple((prefix + proper, prefix + second) for proper, second in layout.copies),
    )


def sources(layout: Layout, spec: Tree) -> Sources:
    """Our paths -> their names and the transform. Raises ValueError when a leaf of the spec has no rule."""
    params = specs.paths(spec)
    return {
        path: described(source, params[path], _default(layout, path, params[path].shape))
        for path, source in sources_of(layout, params).items()
    }


def sources_of(layout: Layout, paths: Collection[str]) -> Sources:
    """The sources of some paths, without a spec; the rest as in `sources`."""
    compiled = [(re.compile(_regex(rule.ours)), rule) for rule in layout.rules]
    known = set(paths)
    return {path: _source(compiled, path, known) for path in paths}


def keys(layout: Layout, spec: Tree) -> dict[str, tuple[int, ...]]:
    """Their names -> shapes for a spec; costs no memory whatever the size."""
    return shapes_of(sources(layout, spec))


def read_backwards(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Our paths -> shapes as far as tensors of theirs (proper name -> shape) tell: what a spec can be guessed from.

    Names no rule knows, fused leaves that lack a part and shapes a transform cannot take are left out.
    """
    compiled = [(rule, [re.compile(_regex(name)) for name in rule.theirs]) for rule in layout.rules]
    parts_by_path: dict[str, tuple[Rule, dict[int, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        place = next(
            (
                (rule, index, match)
                for rule, patterns in compiled
                for index, p in enumerate(patterns)
                if (match := p.fullmatch(name))
            ),
            None,
        )
        if place:
            rule, index, match = place
            parts_by_path.setdefault(_fill(rule.ours, match), (rule, {}))[1][index] = shape
    joined = {path: _joined_shape(rule, parts) for path, (rule, parts) in parts_by_path.items()}
    return {path: shape for path, shape in joined.items() if shape is not None}


def name_of(layout: Layout, path: str) -> str:
    """The (first) name in files of one of our paths."""
    compiled = [(re.compile(_regex(rule.ours)), rule) for rule in layout.rules]
    return _source(compiled, path, {path}).names[0]


def _joined_shape(rule: Rule, parts: Mapping[int, tuple[int, ...]]) -> tuple[int, ...] | None:
    if len(parts) < len(rule.theirs):
        return None
    try:
        tensors = [torch.empty(parts[index], device="meta", dtype=torch.float32) for index in range(len(parts))]
        return tuple(rule.transform.join(tensors).shape)
    except (RuntimeError, IndexError, OverflowError, TypeError):
        return None


def canonical(layout: Layout, names: Iterable[str]) -> dict[str, str]:
    """The name the rules use -> the name in the file, without what is ignored.

    Where a file has a tensor under its proper name and under another, the proper one counts.
    """
    aliases = [(re.compile(_regex(alias)), template) for alias, template in layout.aliases]
    ignored = [re.compile(_regex(pattern)) for pattern in layout.ignored]
    names_by_rule: dict[str, str] = {}
    for name in names:
        if any(pattern.fullmatch(name) for pattern in ignored):
            continue
        proper = next((_fill(template, m) for pattern, template in aliases if (m := pattern.fullmatch(name))), name)
        if proper == name or proper not in names_by_rule:
            names_by_rule[proper] = name
    return names_by_rule


def to_ours(layout: Layout, spec: Tree, fetch: Callable[[Source, specs.Param], Tensor]) -> Params:
    """The parameters of a spec, each leaf as `fetch(source, param)` returns it."""
    known = sources(layout, spec)
    return specs.map_params(lambda path, param: fetch(known[path], param), spec)


def to_theirs(layout: Layout, spec: Tree, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors, mostly views, from ours (path -> tensor)."""
    theirs: dict[str, Tensor] = {}
    for path, source in sources(layout, spec).items():
        theirs.update(zip(source.names, source.transform.split(leaves[path], len(source.names)), strict=True))
    for proper, second in layout.copies:
        theirs[second] = theirs[proper]
    return theirs


def _source(compiled: list[tuple[re.Pattern, Rule]], path: str, known: Collection[str]) -> Source:
    for pattern, rule in compiled:
        if (match := pattern.fullmatch(path)) and _fill(rule.unless, match) not in known:
            return Source(tuple(_fill(name, match) for name in rule.theirs), rule.transform, path)
    raise ValueError(f"no rule of the layout says where {path} comes from")


def _default(layout: Layout, path: str, shape: tuple[int, ...]) -> Callable[[], Tensor] | None:
    """Function that makes a leaf which a file lacks; None if the file must have it."""
    for pattern, fits, make in layout.defaults:
        if re.fullmatch(_regex(pattern), path) and fits(shape):
            return lambda: make(shape)
    return None


def _regex(pattern: str) -> str:
    parts = re.split(r"\{(\*?\w+)\}", pattern)
    named = [f"(?P<{part.lstrip('*')}>{'.+' if part.startswith('*') else '[^.]+'})" for part in parts[1::2]]
    return "".join(re.escape(text) + name for text, name in zip(parts[::2], [*named, ""], strict=True))


def _fill(pattern: str, match: re.Match) -> str:
    return pattern.replace("{*", "{").format_map(match.groupdict())
