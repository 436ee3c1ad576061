"""Description of files without loading them: formats, configs, dtypes, metadata, and values that are not finite.

Of models and of additions to them: ControlNets, IP-Adapters, LoRAs, textual inversions.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from functional_sd3.core import spec as specs
from functional_sd3.core.types import Tree
from functional_sd3.formats import trees
from functional_sd3.formats.trees import Storage, TreePlan
from functional_sd3.layouts.components import SPECS, Config
from functional_sd3.weights import assemble, extras
from functional_sd3.weights.extras import Extra
from functional_sd3.weights.model import Model, Tokenizers, missing
from functional_sd3.weights.read import LoadPlan


class Part(NamedTuple):
    """One component, or a file that accompanies a model.

    format: whose names its tensors have, and below which prefix. where: its file or folder. config: its sizes, or a
    text about them. tree: its leaves as meta tensors of the stored dtypes; of an accompanying file by the names there.
    scaled: how many of its tensors have a scale (scaled fp8). products: "int8" or "float8" -> how many layers multiply
    in it. blocks: type of GGUF's blocks -> number of tensors stored
    in it. nonfinite: (name in the file, "NaN" or "an infinity").
    """

    component: str
    format: str
    where: str
    config: Any
    tree: Tree
    scaled: int
    products: dict[str, int]
    blocks: dict[str, int]
    nonfinite: list[tuple[str, str]]


class Description(NamedTuple):
    """Description of a model's files.

    metadata: file -> that of its header. missing: a sentence for each part of a whole model that is absent.
    """

    parts: list[Part]
    tokenizers: Tokenizers
    schedule: Any
    metadata: dict[str, dict[str, str]]
    missing: list[str]


def describe(
    path: str | os.PathLike | Sequence[str | os.PathLike], *, variant: str | None = None, values: bool = True
) -> Description:
    """Description of what `weights.load` would load, or of one file that accompanies a model.

    values: whether every value is checked for NaN and infinities. Raises WeightsError for what does not load, but for
    NaN and infinities.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if len(paths) == 1 and (extra := extras.find(Path(paths[0]), variant)):
        headers = {str(one.path): one.header.metadata for one in extra.places.values() if one.header.metadata}
        return Description([_extra(extra, values)], Tokenizers(), None, headers, [])
    contents, plans = assemble.plan([Path(one) for one in paths], tuple(SPECS), variant)
    parts = [_part(plans[name], values) for name in SPECS if name in plans]
    tokenizers = Tokenizers(**contents.tokenizers)
    mapped = {one.path: one.header for plan in plans.values() for one in plan.tree.places.values()}
    return Description(
        parts,
        tokenizers,
        contents.schedule,
        {str(path): header.metadata for path, header in mapped.items() if header.metadata},
        missing(Model(config=Config(), params=dict.fromkeys(plans, {}), tokenizers=tokenizers)),
    )


def storage(
    path: str | os.PathLike | Sequence[str | os.PathLike], component: str, *, variant: str | None = None
) -> Storage | None:
    """Storage of a component; None where the path has none. Raises WeightsError for what does not load."""
    paths = [path] if isinstance(path, (str, os.PathLike)) else path
    _, plans = assemble.plan([Path(one) for one in paths], (component,), variant)
    return trees.storage(plans[component].tree) if component in plans else None


def _part(planned: LoadPlan, values: bool) -> Part:
    plan, format = planned.tree, planned.format
    checked = plan.names.values() if values else ()
    nonfinite = [(name, what) for name in checked if (what := trees.nonfinite_kind(plan, name))]
    tree = specs.map_params(lambda path, param: _leaf(plan, plan.sources[path].names, param), plan.spec)
    words = f"named as by {format.owner}" + (f" below {format.prefix}" if format.prefix else "")
    kinds = Counter(trees.entry(plan.places, name).blocks for name in plan.names.values())
    stored = {kind: count for kind, count in kinds.items() if kind}
    computed = Counter(trees.scale_name(name).removesuffix("_scale") for name in plan.scales.values())
    products = {name: count for name, count in computed.items() if name != "scale"}
    return Part(
        planned.component, words, plan.where, planned.config, tree, len(plan.scales), products, stored, nonfinite
    )


def _extra(extra: Extra, values: bool) -> Part:
    looked = (
        [(name, trees.mapped_nonfinite_kind(mapped, name)) for name, mapped in extra.places.items()] if values else []
    )
    nonfinite = [(name, what) for name, what in looked if what]
    leaves = {
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        for name, mapped in extra.places.items()
        for entry in [mapped.header.tensors[name]]
    }
    return Part(extra.kind, extra.format, extra.where, extra.config, _nested(leaves), 0, {}, {}, nonfinite)


def _nested(leaves: Mapping[str, torch.Tensor]) -> Tree:
    """The leaves by the parts of their names; by the whole, with other separators, where one name begins another."""
    root: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *branches, last = name.split(".")
        node: Any = root
        for branch in branches:
            node = node.setdefault(branch, {}) if isinstance(node, dict) else node
        if not isinstance(node, dict) or last in node or "" in name.split("."):
            return {f"tensor {each.replace('.', '/')}": leaf for each, leaf in leaves.items()}
        node[last] = leaf
    return root


def _leaf(plan: TreePlan, names: Sequence[str], param: specs.Param) -> torch.Tensor:
    dtypes = [trees.entry(plan.places, plan.names[name]).dtype for name in names if name in plan.names]
    return torch.empty(param.shape, dtype=dtypes[0] if dtypes else torch.float32, device="meta")
