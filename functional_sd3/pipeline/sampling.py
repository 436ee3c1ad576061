"""The integration of the flow from noise to latents, with guidance and ControlNets in their windows of steps."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key, Params, Velocity
from functional_sd3.flow import guidance as guidances
from functional_sd3.flow import ode, path, schedule
from functional_sd3.flow.guidance import Guidance
from functional_sd3.flow.ode.method import Advance, Method, StepInfo, no_carry
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.fields import Conditions, velocities, velocity
from functional_sd3.pipeline.latents import step_keys
from functional_sd3.transformer import control as controls
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt


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
    block_transform: Callable[[Callable], Callable] | None = None,
    times: Tensor | None = None,
    field: Callable[..., Velocity] | None = None,
    transform: Callable[[Velocity], Velocity] | None = None,
    implementation: Implementation = "sdpa",
) -> Tensor:
    """Latents (normalised, float32) at the end of the flow that starts from `noise`.

    method: a method or the name of one; by default Euler's, or `ode.renoised` where the model's scheduler config says
    `stochastic_sampling`. One that is named draws its noise from `key`: (2,), from which sample i takes
    `fold_in(key, i)`, or (batch, 2).
    guidance: how the velocities of a step are made one, instead of `guidance.cfg(cfg)`; may change from step to step,
    and carry a state. times: (n + 1,) the grid, instead of the config's for `steps`: `noise` is then the state at its
    first time, and of a grid of one time it is the answer. It may ascend, from data to noise. field: makes the
    velocity, called as `velocity` is, which it is by default; `conditions` may be whatever it understands. transform:
    of the guided velocity (`keep_masked` of a mask, for instance). implementation: of attention,
    as of `velocities`. Raises ValueError for a cfg that is not finite, a field with a guidance that carries a state,
    and where a key is needed and none is given.
    """
    guidances.check_scale(cfg, "cfg")
    if isinstance(cfg, Tensor) and cfg.ndim and len(cfg) not in (1, len(noise)):
        raise ValueError(f"cfg {list(cfg.shape)} must be one number, or ({len(noise)},): one for each sample")
    method = chosen_method(config, len(noise), method, key)
    times = sigmas(config, noise, steps) if times is None else times
    steps, carries = len(times) - 1, guidance is not None and guidance.init is not no_carry
    if field is not None and carries:
        raise ValueError("a guidance that carries a state cannot be given to a field of its own: choose one without")
    transform = transform or (lambda velocity: velocity)
    runner = guidances.with_carry(_with_transform(method, transform), guidance) if carries else method
    state = ode.start(runner, noise, times[0])
    # The run is split where the set of active ControlNets or guidance terms changes: inactive ones cost nothing.
    for first, stop, active, step_guidance in _segments(control, guidance, steps):
        grid, ends = times[first : stop + 1], stop == steps
        # The times that an adaptive method evaluates at are not known before.
        known = None if isinstance(method, ode.Adaptive) else evaluation_times(method, grid, len(noise), ends=ends)
        options: dict[str, Any] = {"skip_layers": skip_layers, "control": active, "image_prompt": image_prompt}
        options |= {} if block_transform is None else {"block_transform": block_transform}
        options |= {} if implementation == "sdpa" else {"implementation": implementation}
        if carries:
            needed = velocities(params, config, conditions, step_guidance.needs, known, **options)
            guided = guidances.guided_with_carry(step_guidance, needed)
        else:
            options |= {} if step_guidance is None else {"guidance": step_guidance}
            guided = transform((field or velocity)(params, config, conditions, cfg, known, **options))
        state = ode.run(runner, guided, state, grid, on_step=_renumbered(on_step, first, steps), ends=ends)
    return state.x


def default_method(config: Config) -> str:
    """The name of the method that diffusers' scheduler of the model's config stands for."""
    stochastic = config.schedule is not None and config.schedule.stochastic_sampling
    return "euler_renoised" if stochastic else ode.EULER.name


def chosen_method(
    config: Config, count: int, method: Method | ode.Adaptive | str | None = None, key: Key | None = None
) -> Method | ode.Adaptive:
    """The method, that of a name, or for None the model's default, for `count` samples; `key` as of `sample`."""
    if method is not None and not isinstance(method, str):
        return method
    name = method or default_method(config)
    if method is None and name in ode.STOCHASTIC and key is None:
        raise ValueError(
            f"the model's scheduler config says stochastic_sampling, so each step draws noise ({name}): give key=, "
            "or a method that draws none, such as method=ode.EULER"
        )
    return ode.named(name, key=None if key is None else step_keys(key, count))


def sigmas(config: Config, noise: Tensor, steps: int) -> Tensor:
    """The grid of times that the folder's scheduler config asks for, (steps + 1,) from 1 to 0."""
    settings = config.schedule or schedule.Config()
    tokens = noise.shape[-1] * noise.shape[-2] // config.transformer.patch_size**2
    mu = schedule.resolution_mu(settings, tokens) if settings.use_dynamic_shifting else None
    return schedule.from_config(settings, steps, mu=mu, device=noise.device)


def evaluation_times(method: Method, times: Tensor, count: int = 1, *, ends: bool = True) -> Tensor:
    """The times at which a method evaluates the velocity on this grid, found by running it on `count` numbers, as many
    as it has samples; `ends` as in `ode.run`."""
    evaluated: list[Tensor] = []

    def record(x: Tensor, t: Tensor) -> Tensor:
        evaluated.append(t)
        return x

    ode.run(method, record, ode.start(method, times.new_zeros(count), times[0]), times, ends=ends)
    return torch.stack(evaluated)


def _renumbered(on_step: Callable[[StepInfo], Any] | None, first: int, steps: int) -> Callable[[StepInfo], Any] | None:
    """`on_step` of a part of a run, called with the index and number of steps of the whole."""
    if on_step is None:
        return None
    return lambda info: on_step(info._replace(index=first + info.index, steps=steps))


def _with_transform(method: Method, transform: Callable[[Velocity], Velocity]) -> Method:
    """The method on transformed velocities; an adaptive one as it is, for `with_carry` to refuse."""
    if isinstance(method, ode.Adaptive):
        return method

    def step(velocity: Velocity, *state: Any) -> Advance:
        return method.step(transform(velocity), *state)

    return method._replace(step=step, last=method.last and _with_transform(method.last, transform))


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
