"""What lies at a path, without loading it: forms, configs, dtypes, metadata, and whether all values are finite."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from functional_sd3.core import spec as specs
from functional_sd3.core.types import Tree
from functional_sd3.weights import composing, files, finite, layout
from functional_sd3.weights.model import SPECS, Model, Tokenizers, missing
from functional_sd3.weights.reading import Plan


class Part(NamedTuple):
    """One component. form: whose names its tensors have, and below which prefix; where: its file or folder.

    tree: its leaves as meta tensors of the dtypes they are stored in; scaled: how many of its tensors have a scale
    (scaled fp8); strangers: (name in the file, "NaN" or "an infinity").
    """

    component: str
    form: str
    where: str
    config: Any
    tree: Tree
    scaled: int
    strangers: list[tuple[str, str]]


class Description(NamedTuple):
    """metadata: file -> what its header says beside its tensors; missing: what a whole model has and this lacks."""

    parts: list[Part]
    tokenizers: Tokenizers
    schedule: Any
    metadata: dict[str, dict[str, str]]
    missing: list[str]


def describe(
    path: str | os.PathLike | Sequence[str | os.PathLike], *, variant: str | None = None, values: bool = True
) -> Description:
    """What `weights.load` would load. values: whether to look at every value for NaN and infinities.

    Raises WeightsError for what does not load, but for NaN and infinities.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    contents, plans = composing.plan([Path(one) for one in paths], tuple(SPECS), variant)
    parts = [_part(plans[name], values) for name in SPECS if name in plans]
    tokenizers = Tokenizers(**contents.tokenizers)
    mapped = {one.path: one.header for plan in plans.values() for one in plan.places.values()}
    return Description(
        parts,
        tokenizers,
        contents.schedule,
        {str(path): header.metadata for path, header in mapped.items() if header.metadata},
        missing(Model(None, dict.fromkeys(plans), tokenizers)),
    )


def _part(plan: Plan, values: bool) -> Part:
    found = layout.sources(plan.layout, plan.spec)
    strangers = [(name, what) for name in (plan.names.values() if values else ()) if (what := _stranger(plan, name))]
    tree = specs.map_params(lambda path, param: _leaf(plan, found[path].names, param), plan.spec)
    form = f"named as by {plan.form.owner}" + (f" below {plan.form.prefix}" if plan.form.prefix else "")
    return Part(plan.component, form, plan.where, plan.config, tree, len(plan.scales), strangers)


def _leaf(plan: Plan, names: Sequence[str], param: specs.Param) -> torch.Tensor:
    dtypes: Mapping[str, torch.dtype] = {
        name: plan.places[plan.names[name]].header.tensors[plan.names[name]].dtype
        for name in names
        if name in plan.names
    }
    return torch.empty(param.shape, dtype=next(iter(dtypes.values()), torch.float32), device="meta")


def _stranger(plan: Plan, name: str) -> str | None:
    for read in (name, plan.scales.get(name)):
        if read:
            what = finite.stranger(files.tensor(plan.places[read], read))
            files.release(plan.places[read], read)
            if what:
                return what
    return None
