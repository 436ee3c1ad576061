"""Parameters that come without the rest of a model (ControlNets, IP-Adapters): one tree from the tensors of its files.

First everything is checked, then everything is read, as for whole models.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import spec as specs
from functional_sd3.core import tree
from functional_sd3.core.types import Params, Tree
from functional_sd3.formats import files
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.files import Mapped
from functional_sd3.layouts import rules
from functional_sd3.layouts.rules import Layout
from functional_sd3.weights import default_dtype
from functional_sd3.weights import read as reading
from functional_sd3.weights.default_dtype import Dtype


def open_file(path: Any) -> dict[str, Mapped]:
    """Every tensor of a safetensors file by name, mapped and not yet read."""
    mapped = files.open_mapped(path)
    return dict.fromkeys(mapped.header.tensors, mapped)


def shapes(places: Mapping[str, Mapped]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor."""
    return {name: mapped.header.tensors[name].shape for name, mapped in places.items()}


def read(
    where: str,
    places: Mapping[str, Mapped],
    table: Layout,
    spec: Tree,
    *,
    dtype: Dtype,
    device: torch.device | str,
    finite: bool = True,
) -> Params:
    """The tree of a spec from tensors named as a layout says. dtype: as of `weights.load`. finite: whether NaN and
    infinities are refused.

    Raises WeightsError naming `where` and every tensor that is missing, unexpected, misshapen or not a float, or the
    first with a NaN or an infinity.
    """
    names = rules.canonical(table, places)
    entries = {proper: places[name].header.tensors[name] for proper, name in names.items()}
    try:
        known = rules.sources(table, spec)
        problems = rules.check(table, spec, {name: entry.shape for name, entry in entries.items()}, known)
        problems = problems or reading.too_large_to_compute(names, shapes(places), known)
    except (RuntimeError, OverflowError) as error:
        raise WeightsError(f"{where}: its config describes tensors too large to exist: {error}") from error
    problems += [
        f"{name} has dtype {entry.dtype}, not a float"
        for name, entry in entries.items()
        if not entry.dtype.is_floating_point
    ]
    if problems:
        raise WeightsError([f"{where}: {problem}" for problem in problems])
    plan = reading.LoadPlan(where, None, where, None, spec, table, names, dict(places), {}, True, known)
    default_dtype.check(dtype)
    if dtype is None:
        kinds = reading.kinds(plan)
        if chosen := default_dtype.choose(None, kinds, device):
            default_dtype.say(kinds - {chosen}, {chosen}, device)
    return reading.read(plan, dtype=dtype, device=device, check_finite=finite)


def tensors(table: Layout, spec: Tree, params: Params) -> dict[str, Tensor]:
    """Their tensors from the tree. Raises WeightsError when the parameters do not fit the spec."""
    leaves = tree.flatten_paths(params)
    problems = specs.check(spec, leaves)
    if problems:
        raise WeightsError(problems)
    return rules.to_theirs(table, spec, leaves)
