"""Velocity fields of prompts, ControlNets and image prompts: the guided one, or all that guidance combines."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Params, Tree, Velocity
from functional_sd3.flow import guidance as guidances
from functional_sd3.flow.guidance import Branch, Guidance, Velocities
from functional_sd3.flow.times import at_hand
from functional_sd3.layouts.components import Config
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.transformer import control as controls
from functional_sd3.transformer import ip_adapter, mmdit
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt


class Conditions(NamedTuple):
    """Conditioning of the prompts and of the negative prompts, both (batch, ...)."""

    positive: Conditioning
    negative: Conditioning


def slice_batch(conditions: Conditions, index: slice | Tensor) -> Conditions:
    """Some of the samples of a batch."""
    return Conditions(*(Conditioning(*(part[index] for part in half)) for half in conditions))


def concat_conditions(conditions: Sequence[Conditions]) -> Conditions:
    """The batches one after the other; all must be of the same number of tokens."""
    halves = zip(*conditions, strict=True)
    return Conditions(*(Conditioning(*map(torch.cat, zip(*half, strict=True))) for half in halves))


def velocity(
    params: Params,
    config: Config,
    conditions: Conditions,
    cfg: float | Tensor = 5.0,
    times: Tensor | None = None,
    *,
    guidance: Guidance | None = None,
    skip_layers: Sequence[int] = (),
    control: Sequence[Control] = (),
    image_prompt: ImagePrompt | None = None,
    block_transform: Callable[[Callable], Callable] | None = None,
    implementation: Implementation = "sdpa",
) -> Velocity:
    """The guided velocity field of the prompts: (x (batch, ...), t ()) -> dx/dt.

    guidance: `guidance.cfg(cfg)` by default; one that carries no state, and of one step (`guidance.at`) where it
    changes from step to step: `sample` takes any. The rest as in `velocities`.
    """
    guidance = guidances.cfg(cfg) if guidance is None else guidance
    options: dict[str, Any] = {"skip_layers": skip_layers, "control": control, "image_prompt": image_prompt}
    options |= {"block_transform": block_transform, "implementation": implementation}
    return guidances.guided(guidance, velocities(params, config, conditions, guidance.needs, times, **options))


def velocities(
    params: Params,
    config: Config,
    conditions: Conditions,
    needs: Mapping[str, Branch],
    times: Tensor | None = None,
    *,
    skip_layers: Sequence[int] = (),
    control: Sequence[Control] = (),
    image_prompt: ImagePrompt | None = None,
    block_transform: Callable[[Callable], Callable] | None = None,
    implementation: Implementation = "sdpa",
) -> Callable[[Tensor, Tensor], Velocities]:
    """Several velocity fields at one point: (x (batch, ...), t ()) -> {name: dx/dt}, for `guidance.guided`.

    needs: by name, how each differs from that of the prompts (`Guidance.needs`); those that differ in their
    conditioning alone are evaluated in one batch.
    times: (n,) all the times it will be evaluated at. The modulations of every block depend on the time and the pooled
    vector alone; they are then computed once for all of them, and a third of the weights is read once an image
    instead of once a step. Without `times` t may be any, () or (batch,). control: ControlNets, active at every t;
    their start and end belong to `sample`. image_prompt: an IP-Adapter and features, in whose place the negative
    prompt has zeros. block_transform: as of `mmdit.apply`; `transform.compile` compiles one block for all of them.
    implementation: of attention, of the transformer, its ControlNets and its image prompt; "math" has the derivatives
    that the fused kernels lack (`attention.attention`).
    """
    for one in control:
        controls.check(one, config.transformer)
    batch = len(conditions.positive.pooled)
    control_images, features = controls.per_sample(control, batch), ip_adapter.per_sample(image_prompt, batch)
    no_features = {**features, "features": torch.zeros_like(features["features"])} if features else {}
    tables: list[tuple[Branch, Tree]] = []
    fields = []
    for group in _groups(needs):
        branch = next(iter(group.values()))
        weights, sizes = branch.model or (params["transformer"], None)
        sizes = sizes or config.transformer
        arguments = {}
        for name, one in group.items():
            condition = _conditioning(one.conditioning, conditions, batch)
            own_features = no_features if one.conditioning == "negative" else features
            rows = () if times is None else (_table(tables, one, weights, sizes, condition.pooled, times, control),)
            arguments[name] = (*condition, control_images, own_features, *rows)
        _check_lengths({name: context for name, (context, *_) in arguments.items()})
        options = {"skip_layers": skip_layers, "block_transform": block_transform, **dict(branch.options)}
        evaluate = _network(weights, sizes, options, times, control, image_prompt, implementation)
        fields.append(guidances.together(evaluate, arguments))

    def answers(x: Tensor, t: Tensor) -> dict[str, Tensor]:
        return {name: answer for field in fields for name, answer in field(x, t).items()}

    return answers


def _network(
    weights: Params,
    sizes: mmdit.Config,
    options: dict[str, Any],
    times: Tensor | None,
    control: Sequence[Control],
    image_prompt: ImagePrompt | None,
    implementation: Implementation,
) -> Callable[..., Tensor]:
    """One evaluation: (x, t, then conditioning, images and modulations of each row of the batch) -> dx/dt."""

    def evaluate(
        x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, images: Tree, features: Tree, *rows: Tree
    ) -> Tensor:
        modulations = _at(rows, times, t) if rows else {"transformer": None, "control": None}
        active = [one._replace(**image) for one, image in zip(control, images, strict=True)]
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
            image_prompt=ip_adapter.prompt(image_prompt, features, t, sizes, implementation=implementation),
            implementation=implementation,
            **options,
        )

    return evaluate


def _groups(needs: Mapping[str, Branch]) -> list[dict[str, Branch]]:
    """The branches that one evaluation of a network can answer, in order."""
    groups: list[dict[str, Branch]] = []
    for name, branch in needs.items():
        for group in groups:
            other = next(iter(group.values()))
            if other.options == branch.options and guidances.same_model(other, branch):
                group[name] = branch
                break
        else:
            groups.append({name: branch})
    return groups


def _conditioning(conditioning: Any, conditions: Conditions, batch: int) -> Conditioning:
    if isinstance(conditioning, str):
        return getattr(conditions, conditioning)
    return Conditioning(*(part.expand(batch, *part.shape[1:]) for part in conditioning))


def _table(tables: list[tuple[Branch, Tree]], branch: Branch, weights, sizes, pooled, times, control) -> Tree:
    """Modulations at all times, batch first as everything that guidance joins: once for each conditioning and model."""
    for other, table in tables:
        if other.conditioning is branch.conditioning and guidances.same_model(other, branch):
            return table
    made = {
        "transformer": mmdit.modulations(weights, sizes, times[:, None], pooled),
        "control": controls.modulations(control, times[:, None], pooled),
    }
    table = tree.map(lambda leaf: leaf.transpose(0, 1), made)
    tables.append((branch, table))
    return table


def _check_lengths(contexts: Mapping[str, Tensor]) -> None:
    lengths = {name: context.shape[1] for name, context in contexts.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"conditionings that differ in their number of tokens: {lengths}; encode them to one length")


def _at(rows: Sequence[Any], times: Tensor, t: Tensor) -> Any:
    matches = times == t
    if at_hand(matches) and not matches.any():
        raise ValueError(
            f"the velocity is evaluated at t = {t.tolist()}, which is not among the {len(times)} times that it was "
            "made for; pass times=None for any t"
        )
    # Chosen by a tensor, not by a number, so that no value is read from a device.
    index = matches.to(torch.uint8).argmax().reshape(1)
    return tree.map(lambda leaf: leaf.index_select(1, index).squeeze(1), rows[0])
