"""Trees in files, as `discover` and `assemble` hand them on: planned, with every problem named, and read."""

from typing import Any, NamedTuple

import torch

from functional_sd3.core.types import Params
from functional_sd3.formats import scaled_fp8, trees
from functional_sd3.formats.default_dtype import Dtype
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.files import Mapped
from functional_sd3.formats.trees import TreePlan
from functional_sd3.layouts import rules
from functional_sd3.layouts.format import Format


class ComponentFiles(NamedTuple):
    """The tensors of one tree, by the names they have in their files, and their format.

    component: "clip" where nothing tells L from G yet. where: what to call it in messages. config: what a file beside
    the tensors or their metadata determine; None where it has to be read off the shapes.
    """

    component: str
    format: Format
    where: str
    places: dict[str, Mapped]
    config: Any = None


class Discovered(NamedTuple):
    """Contents of a path. has_schedule: True if a file there would hold the schedule if there were one;
    passed: sentences on files beside a model that are no part of it."""

    pieces: list[ComponentFiles]
    tokenizers: dict[str, Any]
    schedule: Any = None
    has_schedule: bool = False
    problems: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()


class LoadPlan(NamedTuple):
    """A component that was checked and is still to be read. has_config: whether the config was read from a file, not
    inferred from shapes."""

    component: str
    format: Format
    config: Any
    has_config: bool
    tree: TreePlan


def config(piece: ComponentFiles) -> Any:
    """The config of a tree, read off the shapes where no file holds it. Raises WeightsError as `Format.config` does."""
    if piece.config is not None:
        return piece.config
    _, places = scaled_fp8.split(piece.places, [])
    drops_ones = any(mapped.header.drops_ones for mapped in places.values())
    try:
        return piece.format.config(trees.shapes(places), drops_ones)
    except WeightsError as error:
        raise WeightsError([f"{piece.where}: {problem}" for problem in error.problems]) from None


def plan(piece: ComponentFiles) -> LoadPlan:
    """Check the files of a tree and plan how to read them. Raises WeightsError naming every tensor that is missing,
    unexpected, misshapen or of a dtype that is not read."""
    problems: list[str] = []
    scales, places = scaled_fp8.split(piece.places, problems)
    problems = [f"{piece.where}: {problem}" for problem in problems]
    try:
        described = config(piece)
        spec, layout = piece.format.spec(described), piece.format.layout(described)
        names, sources = rules.canonical(layout, places), rules.sources(layout, spec)
        tree = trees.check(TreePlan(piece.where, spec, sources, names, piece.places, scales))
    except WeightsError as error:
        raise WeightsError([*problems, *error.problems]) from None
    except (RuntimeError, OverflowError) as error:
        raise WeightsError(f"{piece.where}: its config describes tensors too large to exist: {error}") from error
    if problems:
        raise WeightsError(problems)
    return LoadPlan(piece.component, piece.format, described, piece.config is not None, tree)


def load(piece: ComponentFiles, *, dtype: Dtype, device: torch.device | str, finite: bool = True) -> tuple[Params, Any]:
    """(parameters, config) of a tree that comes without the rest of a model. Arguments as in `weights.load`; raises
    what `plan` raises, and WeightsError for values that are not finite."""
    planned = plan(piece)
    return trees.load(planned.tree, dtype=dtype, device=device, finite=finite), planned.config
