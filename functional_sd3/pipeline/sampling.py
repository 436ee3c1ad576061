"""From noise to latents: the velocity field of prompts, pictures and image prompts, and the run that follows it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Params, Tree, Velocity
from functional_sd3.flow import guidance, ode, schedule
from functional_sd3.flow.method import Method, StepInfo
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
    skip_layers: Sequence[int] = (),
    control: Sequence[Control] = (),
    image_prompt: ImagePrompt | None = None,
) -> Velocity:
    """The guided velocity field of the prompts: (x (batch, ...), t ()) -> dx/dt.

    times: (n,) all the times it will be asked at. The modulations of every block depend on the time and the pooled
    vector alone; they are then computed once for all of them, and a third of the weights is read once a picture
    instead of once a step. Without `times` any t goes, () or (batch,). control: ControlNets, which speak at every t;
    their start and end belong to `sample`. image_prompt: an IP-Adapter and features, of which what is guided away from
    sees zeros.
    """
    weights, sizes = params["transformer"], config.transformer
    for one in control:
        controls.check(one, sizes)
    pictures = controls.rows(control, len(conditions.positive.pooled))
    shown = ip_adapter.rows(image_prompt, len(conditions.positive.pooled))

    def evaluate(
        x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, pictures: Tree, shown: Tree, *rows: Tree
    ) -> Tensor:
        given = _at(rows, times, t) if rows else {"transformer": None, "control": None}
        told = [one._replace(**picture) for one, picture in zip(control, pictures, strict=True)]
        heard = controls.residuals(told, weights, sizes, x, t, context, pooled, modulations=given["control"])
        return mmdit.apply(
            weights,
            sizes,
            x,
            t,
            context,
            pooled,
            modulations=given["transformer"],
            skip_layers=skip_layers,
            residuals=heard.residuals,
            residual_after_last=heard.after_last,
            image_prompt=ip_adapter.prompt(image_prompt, shown, t, sizes),
        )

    def arguments(condition: Conditioning, shown: Tree) -> tuple:
        if times is None:
            return (*condition, pictures, shown)
        table = {
            "transformer": mmdit.modulations(weights, sizes, times[:, None], condition.pooled),
            "control": controls.modulations(control, times[:, None], condition.pooled),
        }
        # Batch first, as everything that guidance joins.
        return (*condition, pictures, shown, tree.map(lambda leaf: leaf.transpose(0, 1), table))

    unseen = {**shown, "features": torch.zeros_like(shown["features"])} if shown else {}
    return guidance.batched(
        evaluate, arguments(conditions.negative, unseen), arguments(conditions.positive, shown), cfg
    )


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
