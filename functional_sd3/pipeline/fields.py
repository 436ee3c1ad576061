"""Velocity fields of prompts, ControlNets and image prompts: the guided one, or all that guidance combines."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from functional_sd3.core import computation
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Params, Velocity
from functional_sd3.flow import guidance as guidances
from functional_sd3.flow.guidance import Branch, Guidance, Velocities
from functional_sd3.flow.stepwise import RunVelocity, Stepwise, map_steps
from functional_sd3.layouts.components import Config, require
from functional_sd3.pipeline import branches
from functional_sd3.pipeline.branches import Conditions
from functional_sd3.pipeline.dividing import rows_group
from functional_sd3.pipeline.modulation_table import Table, concat_batches, split_steps
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.transformer import control as controls
from functional_sd3.transformer import ip_adapter
from functional_sd3.transformer.block_cache import BlockTransform
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt
from functional_sd3.transformer.mmdit import AttendBlocks

JointVelocities = Callable[[Tensor, Tensor], Velocities]
"""Several velocity fields at one point: (x (batch, ...), t) -> {name: dx/dt}."""

Field = Callable[..., RunVelocity]
"""Makes a velocity, called as `velocity` is: (params, config, conditions, cfg, times, **options)."""


def slice_batch(conditions: Conditions, index: slice | Tensor) -> Conditions:
    """Some of the samples of a batch."""
    return Conditions(*(Conditioning(*(part[index] for part in half)) for half in conditions))


@overload
def velocity(
    params: Params,
    config: Config,
    conditions: Conditions,
    cfg: float | Tensor = 5.0,
    times: Tensor | None = None,
    *,
    ends: Tensor | None = None,
    guidance: Guidance | None = None,
    skip_layers: Sequence[int] = (),
    control: Sequence[Control] = (),
    image_prompt: ImagePrompt | None = None,
    block_transform: computation.BlockTransform | None = None,
    attend: AttendBlocks | None = None,
    implementation: Implementation = "sdpa",
) -> Velocity: ...
@overload
def velocity(
    params: Params,
    config: Config,
    conditions: Conditions,
    cfg: float | Tensor,
    times: Sequence[Tensor],
    *,
    ends: Sequence[Tensor] | None = None,
    guidance: Guidance | None = None,
    skip_layers: Sequence[int] = (),
    control: Sequence[Control] = (),
    image_prompt: ImagePrompt | None = None,
    block_transform: computation.BlockTransform | None = None,
    attend: AttendBlocks | None = None,
    implementation: Implementation = "sdpa",
) -> Stepwise[Velocity]: ...


def velocity(
    params: Params,
    config: Config,
    conditions: Conditions,
    cfg: float | Tensor = 5.0,
    times: Tensor | Sequence[Tensor] | None = None,
    *,
    ends: Tensor | Sequence[Tensor] | None = None,
    guidance: Guidance | None = None,
    skip_layers: Sequence[int] = (),
    control: Sequence[Control] = (),
    image_prompt: ImagePrompt | None = None,
    block_transform: computation.BlockTransform | None = None,
    attend: AttendBlocks | None = None,
    implementation: Implementation = "sdpa",
) -> RunVelocity:
    """The guided velocity field of the prompts: (x (batch, ...), t ()) -> dx/dt, `Stepwise` where times are.

    guidance: `guidance.cfg(cfg)` by default; one that carries no state, and of one step (`guidance.at`) where it
    changes from step to step: `sample` takes any. The rest as in `velocities`.
    """
    guidance = guidances.cfg(cfg) if guidance is None else guidance
    # Two unions are more than mypy matches with the overloads.
    of_times: dict[str, Any] = {"times": times, "ends": ends}
    fields: Any = velocities(
        params,
        config,
        conditions,
        guidance.needs,
        **of_times,
        skip_layers=skip_layers,
        control=control,
        image_prompt=image_prompt,
        block_transform=block_transform,
        attend=attend,
        implementation=implementation,
    )
    return map_steps(partial(guidances.guided, guidance), fields)


@overload
def velocities(
    params: Params,
    config: Config,
    conditions: Conditions,
    needs: Mapping[str, Branch],
    times: Tensor | None = None,
    *,
    ends: Tensor | None = None,
    skip_layers: Sequence[int] = (),
    control: Sequence[Control] = (),
    image_prompt: ImagePrompt | None = None,
    block_transform: computation.BlockTransform | None = None,
    attend: AttendBlocks | None = None,
    implementation: Implementation = "sdpa",
) -> JointVelocities: ...
@overload
def velocities(
    params: Params,
    config: Config,
    conditions: Conditions,
    needs: Mapping[str, Branch],
    times: Sequence[Tensor],
    *,
    ends: Sequence[Tensor] | None = None,
    skip_layers: Sequence[int] = (),
    control: Sequence[Control] = (),
    image_prompt: ImagePrompt | None = None,
    block_transform: computation.BlockTransform | None = None,
    attend: AttendBlocks | None = None,
    implementation: Implementation = "sdpa",
) -> Stepwise[JointVelocities]: ...


def velocities(
    params: Params,
    config: Config,
    conditions: Conditions,
    needs: Mapping[str, Branch],
    times: Tensor | Sequence[Tensor] | None = None,
    *,
    ends: Tensor | Sequence[Tensor] | None = None,
    skip_layers: Sequence[int] = (),
    control: Sequence[Control] = (),
    image_prompt: ImagePrompt | None = None,
    block_transform: computation.BlockTransform | None = None,
    attend: AttendBlocks | None = None,
    implementation: Implementation = "sdpa",
) -> JointVelocities | Stepwise[JointVelocities]:
    """Several velocity fields at one point: (x (batch, ...), t ()) -> {name: dx/dt}, for `guidance.guided`.

    needs: by name, how each differs from that of the prompts (`Guidance.needs`); those that differ in their
    conditioning alone are evaluated in one batch.
    times: the times of all evaluations, (n,) or (n, batch), where they are known; or a sequence of such tensors, those
    of each step (`ode.evaluation_times`), for the field of each step, `Stepwise`. The modulations of every block depend
    on the time and the pooled vector alone: they are computed at once for all times, so that a third of the weights is
    read once an image instead of once a step. At another t the velocity raises ValueError, or is NaN where t cannot be
    read (on a device, under transforms and compile), and it has no derivative in t. None: any t, () or (batch,).
    ends: of a model with `interval_size`, r of the mean velocity over [r, t]: for each of `times`, or without times
    one for every t, () or (batch,). None: r = t, the velocity at t.
    control: ControlNets, active at every t; their start and end belong to `sample`. image_prompt: an IP-Adapter and
    features, in whose place the negative prompt has zeros. block_transform: as in `mmdit.apply`; `transform.compile`
    compiles one block for all of them. attend: as in `mmdit.apply`. implementation: as in `attention.attention`, of the
    transformer, its ControlNets and its image prompt.
    """
    for one in control:
        controls.check(one, require(config, "transformer"))
    batch = len(conditions.positive.pooled)
    control_images, features = controls.per_sample(control, batch), ip_adapter.per_sample(image_prompt, batch)
    no_features = {**features, "features": torch.zeros_like(features["features"])} if features else {}
    conditionings = {
        name: branches.conditioning_of(branch.conditioning, conditions, batch) for name, branch in needs.items()
    }
    branches.check_lengths(groups := branches.groups_of(needs), conditionings)
    by_step = [] if times is None else _listed(times)
    intervals = None if ends is None or not by_step else torch.cat(by_step) - torch.cat(_listed(ends))
    end = ends if isinstance(ends, Tensor) and not by_step else None
    tables = branches.tables_of(params, config, needs, conditionings, by_step, intervals, control)
    rows = rows_group(config)
    fields: list[tuple[Callable[..., Velocities], Sequence[Table | None]]] = []
    for group in groups:
        branch = needs[group[0]]
        options = {
            "skip_layers": skip_layers,
            **({} if branch.model else computation.of(config, "transformer").options),
            **({} if block_transform is None else {"block_transform": block_transform}),
            "attend": attend,
            **dict(branch.options),
        }
        model = branches.model_of(branch, params, config)
        evaluate = branches.network(*model, options, control, image_prompt, implementation, end, rows)
        arguments = {}
        for name in group:
            own_features = no_features if needs[name].conditioning == "negative" else features
            arguments[name] = (*conditionings[name], control_images, own_features)
        of_steps = split_steps(concat_batches([tables[name] for name in group]), by_step) if tables else [None]
        fields.append((guidances.batch_fields(evaluate, arguments), of_steps))

    def at(step: int) -> JointVelocities:
        # around: a transform of the block function for each evaluation of a network, by its index (`cached_steps`);
        # a compiler does not evaluate its annotation.
        def evaluate_all(x: Tensor, t: Tensor, around: "Callable[[int], BlockTransform] | None" = None) -> Velocities:
            by_name: dict[str, Tensor] = {}
            for index, (field, of_steps) in enumerate(fields):
                options = {} if around is None else {"around": around(index)}
                by_name |= field(x, t, table=of_steps[step], **options)
            return by_name

        return evaluate_all

    return at(0) if times is None or isinstance(times, Tensor) else Stepwise(at)


def _listed(times: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [times] if isinstance(times, Tensor) else list(times)
