"""Latents edited from one prompt to another: by inversion to noise and back, or along the difference of two flows.

Rout et al. 2024, "Semantic Image Inversion and Editing using Rectified Stochastic Differential Equations",
arXiv:2410.10792, in this project's time (t = 1 is noise); Kulikov et al. 2024, "FlowEdit", arXiv:2412.08629.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key, Params, Velocity
from functional_sd3.flow import ode, path, schedule
from functional_sd3.flow.ode.method import Method
from functional_sd3.flow.path import broadcast
from functional_sd3.flow.stepwise import RunVelocity, map_steps
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.fields import Conditions, Field, velocity
from functional_sd3.pipeline.latents import sample_keys
from functional_sd3.pipeline.request import FlowEdit, InversionEdit, SamplingOptions, check_eta, check_window
from functional_sd3.pipeline.sampling import chosen_method, sample, sigmas

Transform = Callable[[Velocity], Velocity]


def edit_latents(
    params: Params,
    config: Config,
    conditions: tuple[Conditions, Conditions],
    latents: Tensor,
    edit: InversionEdit,
    sampling: SamplingOptions,
    *,
    key: Key | None = None,
) -> Tensor:
    """The latents of `pipeline.edit`, from latents and the conditions (source, target).

    sampling: of both runs, but for its cfg and guidance, which are the target's. Its method should be one that draws no
    noise, since a run that does leads back to nothing; key: of one that does.
    """
    source, target = conditions
    pull = pull_to(latents, edit.eta, *step_window_times(sigmas(config, latents, sampling.steps), *edit.window))
    noise = invert_latents(
        params, config, source, latents, _of_source(sampling, edit.cfg), inversion=edit.inversion, key=key
    )
    return sample(params, config, target, noise, transform=pull, key=key, **vars(sampling))


def invert_latents(
    params: Params,
    config: Config,
    conditions: Conditions,
    latents: Tensor,
    sampling: SamplingOptions,
    *,
    inversion: Callable[[Method], Method] | None = None,
    key: Key | None = None,
) -> Tensor:
    """The noise from which the flow of the conditions leads to the latents, (batch, channels, height, width) as these.

    inversion: how a method's steps are undone, `fixed_point.inverse` for instance, several evaluations a step: then
    `sample` leads from the noise to the latents again. By default the flow is followed back with the method itself.
    """
    times = sigmas(config, latents, sampling.steps).flip(0)
    method = chosen_method(config, len(latents), sampling.method, key)
    if inversion is not None:
        if isinstance(method, ode.Adaptive):
            raise ValueError(f"{method.name} chooses its own steps, which cannot be undone one by one: take ode.EULER")
        method = inversion(method)
    options = vars(replace(sampling, method=method))
    return sample(params, config, conditions, latents, times=times, key=key, **options)


def pull_to(
    end: Tensor, eta: float | Tensor, first: Tensor | float, last: Tensor | float, place: float = 0.0
) -> Transform:
    """Velocity -> velocity: v + eta ((x - end) / (t - place) - v) from time `first` on, as long as t > `last`.

    (x - end) / (t - place) is the straight line that is at `end` at the time `place`: Rout et al. 2024, eq. 15, with
    the data at place 0; with a noise at place 1, eq. 8, for runs from data to noise. At its own place no line leads to
    it, and a method that evaluates there (`ode.HEUN`, not `ode.HEUN_EDM`) uses v. eta in [0, 1], () or (batch,).
    Raises ValueError for an eta outside, where it is a number.
    """
    check_eta(eta)

    def transform(velocity: Velocity) -> Velocity:
        def pulled(x: Tensor, t: Tensor) -> Tensor:
            plain, distance = velocity(x, t), broadcast(t, x) - place
            inside = (broadcast(t, x) <= first) & (broadcast(t, x) > last) & (distance != 0)
            straight = (x - end) / torch.where(inside, distance, 1.0)
            return plain + torch.where(inside, broadcast(eta, x) * (straight - plain), 0.0)

        return pulled

    return transform


def step_window_times(grid: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
    """First and last time of the steps of a grid in the window from `start` to `end`, fractions of the run.

    Of n steps these are those with start <= i / n and (i + 1) / n <= end, the rule of ControlNets. Raises ValueError
    unless 0 <= start <= end <= 1.
    """
    check_window(start, end)
    steps = len(grid) - 1
    inside = [step for step in range(steps) if start <= step / steps and (step + 1) / steps <= end]
    return (grid[inside[0]], grid[inside[-1] + 1]) if inside else (grid[0], grid[0])


def flow_edit_latents(
    params: Params,
    config: Config,
    conditions: tuple[Conditions, Conditions],
    latents: Tensor,
    key: Key,
    edit: FlowEdit,
    sampling: SamplingOptions,
    *,
    strength: float,
) -> Tensor:
    """The latents of `pipeline.flow_edit`, from latents and the conditions (source, target)."""
    source, target = conditions
    grid, keys = sigmas(config, latents, sampling.steps), sample_keys(key, len(latents))

    def noises(t: Tensor) -> list[Tensor]:
        at = prng.fold_in(keys, schedule.position(grid, t))
        return [prng.normal(prng.fold_in(at, each), latents.shape[1:]).to(latents) for each in range(edit.averages)]

    field, times = edit_field(latents, noises, source, edit.cfg), schedule.partial(grid, strength)
    return sample(params, config, target, latents, times=times, field=field, key=key, **vars(sampling))


def edit_field(
    latents: Tensor, noises: Callable[[Tensor], Sequence[Tensor]], source: Conditions, source_cfg: float | Tensor
) -> Field:
    """The field of FlowEdit for the conditions of the target: its velocities less the source's, averaged."""

    def make(
        params: Params,
        config: Config,
        conditions: Conditions,
        cfg: float | Tensor = 5.0,
        times: Any = None,
        **options: Any,
    ) -> RunVelocity:
        unguided = {name: value for name, value in options.items() if name != "guidance"}
        start = velocity(params, config, source, source_cfg, times, **unguided)
        target = velocity(params, config, conditions, cfg, times, **options)
        return map_steps(mean_difference, start, target)

    def mean_difference(start: Velocity, target: Velocity) -> Velocity:
        def difference(z: Tensor, t: Tensor) -> Tensor:
            noised = [path.interpolate(latents, noise, t) for noise in noises(t)]
            return torch.stack([target(z + x - latents, t) - start(x, t) for x in noised]).mean(0)

        return difference

    return make


def _of_source(sampling: SamplingOptions, cfg: float | Tensor) -> SamplingOptions:
    return replace(sampling, cfg=cfg, guidance=None)
