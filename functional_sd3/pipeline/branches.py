"""Branches of guidance: which one evaluation of a network serves, and their conditionings and modulations."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import computation
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Params, Tree
from functional_sd3.flow import guidance as guidances
from functional_sd3.flow.guidance import Branch
from functional_sd3.layouts.components import Config, require
from functional_sd3.parallel.transport import Group
from functional_sd3.pipeline.dividing import divide_rows
from functional_sd3.pipeline.modulation_table import Table, lookup, mask_invalid
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.transformer import control as controls
from functional_sd3.transformer import ip_adapter, mmdit
from functional_sd3.transformer.block_cache import BlockTransform
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt


class Conditions(NamedTuple):
    """Conditioning of the prompts and of the negative prompts, both (batch, ...)."""

    positive: Conditioning
    negative: Conditioning


def network(
    weights: Params,
    sizes: mmdit.Config,
    options: dict[str, Any],
    control: Sequence[Control],
    image_prompt: ImagePrompt | None,
    implementation: Implementation,
    end: Tensor | None,
    group: Group,
) -> Callable[..., Tensor]:
    """One evaluation: (x, t, then conditioning and images of each row of the batch, table) -> dx/dt.

    around: of one call, a transform of the block function outside of the `block_transform` of the options, for one
    process (`block_cache`).
    """

    def one_network(
        params: Tree,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        pooled: Tensor,
        images: Tree,
        features: Tree,
        modulations: Tree,
        interval: Tensor | None,
        around: "BlockTransform | None" = None,
    ) -> Tensor:
        weights, nets, adapter = params
        pairs = zip(control, nets, images, strict=True)
        active = [one._replace(params=net, **image) for one, net, image in pairs]
        prompt = image_prompt and image_prompt._replace(params=adapter)
        added = controls.residuals(
            active,
            weights,
            sizes,
            x,
            t,
            context,
            pooled,
            modulations=modulations["control"],
            implementation=implementation,
        )
        return mmdit.apply(
            weights,
            sizes,
            x,
            t,
            context,
            pooled,
            modulations=modulations["transformer"],
            residuals=added.residuals,
            residual_after_last=added.after_last,
            interval=interval,
            image_prompt=ip_adapter.prompt(prompt, features, t, sizes, implementation=implementation),
            implementation=implementation,
            **(options if around is None else {**options, "block_transform": _outermost(around, options, sizes.depth)}),
        )

    params = (weights, [one.params for one in control], image_prompt.params if image_prompt else {})
    of_rows = divide_rows(one_network, group)

    def evaluate(
        x: Tensor, t: Tensor, *rows: Tree, table: Table | None, around: "BlockTransform | None" = None
    ) -> Tensor:
        row = None if table is None else lookup(table, t)
        modulations = {"transformer": None, "control": None} if row is None else row.modulations
        interval = None if end is None else _interval(t, end, len(x))
        evaluated = of_rows if around is None else partial(one_network, around=around)
        velocity = evaluated(params, x, t, *rows, modulations, interval)
        return velocity if row is None else mask_invalid(velocity, row)

    return evaluate


def _outermost(around: BlockTransform, options: Mapping[str, Any], depth: int) -> computation.BlockTransform:
    return computation.composed(around, options.get("block_transform"), depth)


def _interval(t: Tensor, end: Tensor, rows: int) -> Tensor:
    """t - r, () or (rows,): `end` (batch,) is that of each sample, and the rows are the batch once for each branch."""
    return t - (end.repeat(rows // len(end)) if end.ndim and len(end) < rows else end)


def groups_of(needs: Mapping[str, Branch]) -> list[list[str]]:
    """The names of branches that one evaluation of a network serves, in order."""
    groups: list[list[str]] = []
    for name, branch in needs.items():
        for group in groups:
            other = needs[group[0]]
            if other.options == branch.options and guidances.same_model(other, branch):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def model_of(branch: Branch, params: Params, config: Config) -> tuple[Params, mmdit.Config]:
    """Parameters and config of a branch's transformer."""
    weights, sizes = branch.model or (params["transformer"], None)
    return weights, sizes or require(config, "transformer")


def conditioning_of(conditioning: Any, conditions: Conditions, batch: int) -> Conditioning:
    """The conditioning (batch, ...) of a branch: of the run by its name, or its own (batch or 1, ...)."""
    if isinstance(conditioning, str):
        return getattr(conditions, conditioning)
    return Conditioning(*(part.expand(batch, *part.shape[1:]) for part in conditioning))


def tables_of(
    params: Params,
    config: Config,
    needs: Mapping[str, Branch],
    conditionings: Mapping[str, Conditioning],
    by_step: Sequence[Tensor],
    intervals: Tensor | None,
    control: Sequence[Control],
) -> dict[str, Table]:
    """Modulations of each branch at all times: once for each conditioning and model."""
    tables: dict[str, Table] = {}
    if not by_step:
        return tables
    times = torch.cat(list(by_step))
    times = times[:, None] if times.ndim == 1 else times
    intervals = intervals[:, None] if intervals is not None and intervals.ndim == 1 else intervals
    for name, branch in needs.items():
        for other, table in tables.items():
            if needs[other].conditioning is branch.conditioning and guidances.same_model(needs[other], branch):
                tables[name] = table
                break
        else:
            pooled = conditionings[name].pooled
            computed = computation.PLAIN if branch.model else computation.of(config, "transformer")
            stored = {name: value for name, value in computed.options.items() if name != "block_transform"}
            made = {
                "transformer": mmdit.modulations(*model_of(branch, params, config), times, pooled, intervals, **stored),
                "control": controls.modulations(control, times, pooled),
            }
            tables[name] = Table(times, made)
    return tables


def check_lengths(groups: Sequence[Sequence[str]], conditionings: Mapping[str, Conditioning]) -> None:
    """Raises ValueError where conditionings that one evaluation serves have different numbers of tokens."""
    for group in groups:
        lengths = {name: conditionings[name].context.shape[1] for name in group}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"conditionings that differ in their number of tokens: {lengths}; encode them to one length"
            )
