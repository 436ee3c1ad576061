"""From noise to latents: the velocity field of prompts, pictures and image prompts, and the run that follows it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Params, Tree, Velocity
from functional_sd3.flow import guidance as guidances
from functional_sd3.flow import ode, schedule
from functional_sd3.flow.guidance import Answers, Branch, Guidance
from functional_sd3.flow.method import Method, StepInfo, no_memory
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.transformer import control as controls
from functional_sd3.transformer import ip_adapter, mmdit
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt
from functional_sd3.weights.model import Config


class Conditions(NamedTuple):
    """What the transformer is told, and what it is guided away from."""

    positive: Conditioning
    negative: Conditioning


def sample(
    params: Params,
    config: Config,
    conditions: Conditions,
    noise: Tensor,
    *,
    steps: int = 28,
    cfg: float | Tensor = 5.0,
    method: Method = ode.EULER,
    on_step: Callable[[StepInfo], Any] | None = None,
    skip_layers: Sequence[int] = (),
    control: Sequence[Control] = (),
    image_prompt: ImagePrompt | None = None,
    times: Tensor | None = None,
    field: Callable[..., Velocity] | None = None,
) -> Tensor:
    """Latents (normalised, float32) at the end of the flow that starts from `noise`.

    times: (n + 1,) the grid, instead of the config's for `steps`: `noise` is then the state at its first time, and of a
    grid of one time it is the answer. It may ascend, from data to noise. field: makes the velocity, called as
    `velocity` is, which it is by default; `conditions` may be whatever it understands.
    """
    times = sigmas(config, noise, steps) if times is None else times
    steps, field = len(times) - 1, field or velocity
    state = ode.start(method, noise, times[0])
    if not steps:
        return state.x
    # While a ControlNet is silent it costs nothing: the run is cut where one starts or ends.
    for first, stop, speaking in controls.segments(control, steps):
        grid, ends = times[first : stop + 1], stop == steps
        asked = evaluation_times(method, grid, ends=ends)
        guided = field(
            params,
            config,
            conditions,
            cfg,
            asked,
            skip_layers=skip_layers,
            control=speaking,
            image_prompt=image_prompt,
        )
        state = ode.run(method, guided, state, grid, on_step=_renumbered(on_step, first, steps), ends=ends)
    return state.x


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
) -> Velocity:
    """The guided velocity field of the prompts: (x (batch, ...), t ()) -> dx/dt.

    guidance: `guidance.cfg(cfg)` by default; one without memory, and of one step (`guidance.at`) where it changes from
    step to step: `sample` takes any. The rest as in `velocities`.
    """
    guiding = guidances.cfg(cfg) if guidance is None else guidance
    told = {"skip_layers": skip_layers, "control": control, "image_prompt": image_prompt}
    return guidances.guided(guiding, velocities(params, config, conditions, guiding.needs, times, **told))


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
) -> Callable[[Tensor, Tensor], Answers]:
    """Several velocity fields at one point: (x (batch, ...), t ()) -> {name: dx/dt}, for `guidance.guided`.

    needs: by name, how each differs from that of the prompts (`Guidance.needs`); those that differ only in what they
    are told are evaluated in one batch.
    times: (n,) all the times it will be asked at. The modulations of every block depend on the time and the pooled
    vector alone; they are then computed once for all of them, and a third of the weights is read once a picture
    instead of once a step. Without `times` any t goes, () or (batch,). control: ControlNets, which speak at every t;
    their start and end belong to `sample`. image_prompt: an IP-Adapter and features, of which what is guided away from
    sees zeros.
    """
    for one in control:
        controls.check(one, config.transformer)
    batch = len(conditions.positive.pooled)
    pictures = controls.rows(control, batch)
    shown = ip_adapter.rows(image_prompt, batch)
    unseen = {**shown, "features": torch.zeros_like(shown["features"])} if shown else {}
    fields = []
    for group in _groups(needs):
        first = next(iter(group.values()))
        weights, sizes = first.model or (params["transformer"], None)
        evaluate = _network(weights, sizes or config.transformer, dict(first.options), skip_layers, control)
        arguments = {
            name: (
                *_conditioning(branch.told, conditions, batch),
                pictures,
                unseen if branch.told == "negative" else shown,
            )
            for name, branch in group.items()
        }
        # ...
        fields.append(guidances.together(evaluate, arguments))

    def answers(x: Tensor, t: Tensor) -> dict[str, Tensor]:
        return {name: answer for field in fields for name, answer in field(x, t).items()}

    return answers


def sigmas(config: Config, noise: Tensor, steps: int) -> Tensor:
    """The grid of times that the folder's scheduler config asks for, (steps + 1,) from 1 to 0."""
    settings = config.schedule or schedule.Config()
    tokens = noise.shape[-1] * noise.shape[-2] // config.transformer.patch_size**2
    mu = schedule.resolution_mu(settings, tokens) if settings.use_dynamic_shifting else None
    return schedule.from_config(settings, steps, mu=mu, device=noise.device)


def evaluation_times(method: Method, times: Tensor, *, ends: bool = True) -> Tensor:
    """The times at which a method asks for the velocity on this grid, found by running it on a number; `ends` as in
    `ode.run`."""
    asked: list[Tensor] = []

    def record(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return x

    ode.run(method, record, ode.start(method, times.new_zeros(1), times[0]), times, ends=ends)
    return torch.stack(asked)


def _renumbered(on_step: Callable[[StepInfo], Any] | None, first: int, steps: int) -> Callable[[StepInfo], Any] | None:
    """Told of a part of a run, `on_step` hears the numbers of the whole."""
    if on_step is None:
        return None
    return lambda info: on_step(info._replace(index=first + info.index, steps=steps))


def _at(rows: Sequence[Any], times: Tensor, t: Tensor) -> Any:
    # Chosen by a tensor, not by a number, so that no value is read on the host.
    index = (times == t).to(torch.uint8).argmax().reshape(1)
    return tree.map(lambda leaf: leaf.index_select(1, index).squeeze(1), rows[0])
