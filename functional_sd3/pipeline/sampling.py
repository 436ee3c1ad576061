"""The integration of the flow from noise to latents, with guidance and ControlNets in their windows of steps."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import computation
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key, Params, Tree, Velocity
from functional_sd3.flow import caching, ode, path, schedule
from functional_sd3.flow import guidance as guidances
from functional_sd3.flow.caches import Cache, is_of_blocks
from functional_sd3.flow.guidance import Guidance, StatefulVelocity
from functional_sd3.flow.ode.method import Method, StepInfo, no_carry
from functional_sd3.layouts.components import Config, require
from functional_sd3.pipeline import cached_steps
from functional_sd3.pipeline.fields import Conditions, Field, velocities, velocity
from functional_sd3.pipeline.latents import step_keys
from functional_sd3.transformer import control as controls
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt
from functional_sd3.transformer.mmdit import AttendBlocks


class NoisedStart(NamedTuple):
    """Latents at the level of noise that a run starts from, and the times of its steps."""

    x: Tensor
    times: Tensor


def add_noise(config: Config, latents: Tensor, noise: Tensor, steps: int, strength: float) -> NoisedStart:
    """The last part of the config's grid of `steps`, and the latents with as much noise as it starts with."""
    times = schedule.partial(sigmas(config, noise, steps), strength)
    return NoisedStart(path.interpolate(latents, noise, times[0]), times)


def sample(
    params: Params,
    config: Config,
    conditions: Conditions,
    noise: Tensor,
    *,
    steps: int = 28,
    cfg: float | Tensor = 5.0,
    guidance: Guidance | None = None,
    method: Method | ode.Adaptive | str | None = None,
    key: Key | None = None,
    on_step: Callable[[StepInfo], Any] | None = None,
    skip_layers: Sequence[int] = (),
    control: Sequence[Control] = (),
    image_prompt: ImagePrompt | None = None,
    block_transform: computation.BlockTransform | None = None,
    attend: AttendBlocks | None = None,
    times: Tensor | None = None,
    field: Field | None = None,
    transform: Callable[[Velocity], Velocity] | None = None,
    implementation: Implementation = "sdpa",
    cache: Cache | str | None = None,
) -> Tensor:
    """Latents (normalised, float32) at the end of the flow that starts from `noise`.

    method: a method or the name of one; by default Euler's, `ode.renoised` where the model's scheduler config has
    `stochastic_sampling`, or `ode.MEANFLOW` where the model is a mean velocity (`distillation`). One that
    is named draws its noise from `key`: (2,), from which sample i takes `fold_in(key, i)`, or (batch, 2).
    guidance: instead of `guidance.cfg(cfg)`; may change from step to step, and carry a state.
    times: the grid, (n + 1,) or (n + 1, batch), instead of the config's for `steps`: `noise` is then the state at its
    first time, and the result for a grid of one time. It may ascend, from data to noise. field: makes the velocity,
    called as `velocity` is, which it is by default; `conditions` may be whatever it takes. transform: of the guided
    velocity (`keep_masked` of a mask, for instance). implementation: of attention, as in `velocities`. cache:
    of `flow.caches`, or its words, such as "extrapolate:every=2": steps in which the velocity is not computed. Raises
    ValueError for a cfg that is not finite, a field with a guidance that carries a state, a cache with an adaptive
    method or one of mean velocities, and where a key is needed and none is given.

    The velocity of a step, its guidance, ControlNets and modulations, is chosen by the step's index (`Stepwise`).
    """
    guidances.check_scale(cfg, "cfg")
    if isinstance(cfg, Tensor) and cfg.ndim and len(cfg) not in (1, len(noise)):
        raise ValueError(f"cfg {list(cfg.shape)} must be one number, or ({len(noise)},): one for each sample")
    method = chosen_method(config, len(noise), method, key)
    has_carry = guidance is not None and guidance.init is not no_carry
    if field is not None and has_carry:
        raise ValueError("a guidance that carries a state cannot be given to a field of its own: choose one without")
    times = sigmas(config, noise, steps) if times is None else times
    runner = guidances.with_carry(method, guidance) if guidance is not None and has_carry else method
    cache = cached_steps.chosen(cache)
    if cache is not None:
        cached_steps.check(cache, config, has_field=field is not None)
        runner = cached_steps.cached_method(runner, cache)
    state = ode.start(runner, noise, times[0])
    grid = torch.as_tensor(times, dtype=state.t.dtype, device=state.t.device)
    if len(grid) == 1:
        return state.x

    # The times that an adaptive method evaluates at are not known before.
    known = None if isinstance(method, ode.Adaptive) else ode.evaluation_times(method, grid, len(noise))
    ends = _ends(config, method, grid, len(noise))
    shared: dict[str, Any] = {"skip_layers": skip_layers, "image_prompt": image_prompt}
    shared |= {} if block_transform is None else {"block_transform": block_transform}
    shared |= {} if implementation == "sdpa" else {"implementation": implementation}
    shared |= {} if attend is None else {"attend": attend}
    by_step: list[Any] = []
    # One velocity for each segment, so that ControlNets and guidance terms cost nothing in the steps without them.
    segments = _segments(control, guidance, len(grid) - 1)
    for first, stop, active, own_guidance in segments:
        options = {**shared, "control": active, **({} if ends is None else {"ends": ends[first:stop]})}
        own_times = None if known is None else known[first:stop]
        if has_carry or (cache is not None and is_of_blocks(cache)):
            guiding = guidances.cfg(cfg) if own_guidance is None else own_guidance
            fields = velocities(params, config, conditions, guiding.needs, own_times, **options)
            of_segment = _combined(fields, guiding, transform, cache, len(noise), has_carry=has_carry)
        else:
            options |= {} if own_guidance is None else {"guidance": own_guidance}
            guided = (field or velocity)(params, config, conditions, cfg, own_times, **options)
            of_segment = _transformed(guided, transform, cache)
        by_step += [ode.at_step(of_segment, step) for step in range(stop - first)]
    by_step = by_step if ends is None else [ode.ignore_end(each) for each in by_step]
    by_index = ode.Stepwise(by_step.__getitem__)
    if cache is not None:
        by_index = caching.cached_steps(cache, by_step, [first for first, *_ in segments])
    return ode.run(runner, by_index, state, grid, on_step=on_step).x


def _combined(
    fields: Any,
    guidance: Guidance,
    transform: Callable[[Velocity], Velocity] | None,
    cache: Cache | None,
    samples: int,
    *,
    has_carry: bool,
) -> Any:
    """The velocity of a guidance that carries a state, or of branches whose blocks are cached, from their fields."""
    after = partial(_transform_stateful, transform) if transform is not None and has_carry else transform
    if cache is not None:
        branches = partial(cached_steps.step_of_branches, has_carry=has_carry)
        return ode.map_steps(lambda step: branches(step, guidance, cache, samples, after), fields)
    stateful: Any = ode.map_steps(partial(guidances.guided_with_carry, guidance), fields)
    return stateful if after is None else ode.map_steps(after, stateful)


def _transformed(guided: Any, transform: Callable[[Velocity], Velocity] | None, cache: Cache | None) -> Any:
    """The guided velocity with the transform, which under a cache is applied after it."""
    if cache is not None:
        return ode.map_steps(lambda velocity: cached_steps.step_of(velocity, transform), guided)
    return guided if transform is None else ode.map_steps(transform, guided)


def _ends(config: Config, method: Method | ode.Adaptive, grid: Tensor, count: int) -> list[Tensor] | None:
    """The r of a mean velocity in each step, None for a method of velocities of one time."""
    if isinstance(method, ode.Adaptive) or not method.mean:
        return None
    if not require(config, "transformer").interval_size:
        raise ValueError(
            f"method {method.name} takes steps of a mean velocity u(x, t, r), and this model has none: its config has "
            "no interval_size. Distil it with --method meanflow, or draw it with method euler"
        )
    return ode.evaluation_ends(method, grid, count)


def default_method(config: Config) -> str:
    """The name of the method of diffusers' scheduler for the model's config; of a student that is a mean
    velocity, that of its steps."""
    levels = config.schedule or schedule.Config()
    if levels.distillation == "meanflow":
        return ode.MEANFLOW.name
    return "euler_renoised" if levels.stochastic_sampling else ode.EULER.name


def chosen_method(
    config: Config, count: int, method: Method | ode.Adaptive | str | None = None, key: Key | None = None
) -> Method | ode.Adaptive:
    """The method, that of a name, or for None the model's default, for `count` samples; `key` as in `sample`."""
    if method is not None and not isinstance(method, str):
        return method
    name = method or default_method(config)
    if method is None and name in ode.STOCHASTIC and key is None:
        raise ValueError(
            f"the model's scheduler config has stochastic_sampling, so each step draws noise ({name}): give key=, "
            "or a method that draws none, such as method=ode.EULER"
        )
    return ode.named(name, key=None if key is None else step_keys(key, count))


def sigmas(config: Config, noise: Tensor, steps: int) -> Tensor:
    """The grid of the model's scheduler config, (steps + 1,) from 1 to 0."""
    settings = config.schedule or schedule.Config()
    tokens = noise.shape[-1] * noise.shape[-2] // require(config, "transformer").patch_size ** 2
    mu = schedule.resolution_mu(settings, tokens) if settings.use_dynamic_shifting else None
    return schedule.from_config(settings, steps, mu=mu, device=noise.device)


def _transform_stateful(transform: Callable[[Velocity], Velocity], velocity: StatefulVelocity) -> StatefulVelocity:
    """The transform of a velocity that carries a state; the state passes through it."""

    def transformed(x: Tensor, t: Tensor, carry: Tree) -> tuple[Tensor, Tree]:
        def evaluate(x: Tensor, t: Tensor) -> Tensor:
            nonlocal carry
            dx, carry = velocity(x, t, carry)
            return dx

        return transform(evaluate)(x, t), carry

    return transformed


def _segments(
    control: Sequence[Control], guidance: Guidance | None, steps: int
) -> list[tuple[int, int, tuple[Control, ...], Guidance | None]]:
    """Parts (first step, step after the last, active ControlNets, guidance) of a run, in order."""
    if not steps:
        return []
    active = controls.segments(control, steps)
    guiding = [(0, steps, None)] if guidance is None else guidances.segments(guidance, steps)

    def during(parts: Sequence[tuple[int, int, Any]], step: int) -> Any:
        return next(value for first, stop, value in parts if first <= step < stop)

    starts = sorted({first for first, *_ in (*active, *guiding)})
    return [
        (first, stop, during(active, first), during(guiding, first))
        for first, stop in zip(starts, [*starts[1:], steps], strict=True)
    ]
