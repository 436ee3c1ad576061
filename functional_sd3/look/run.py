"""The run of one request with everything that its steps pass through kept."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.types import Params
from functional_sd3.flow import guidance as guidances
from functional_sd3.flow import path
from functional_sd3.flow.guidance import Velocities
from functional_sd3.flow.ode.method import StepInfo
from functional_sd3.layouts.components import Config
from functional_sd3.look.clock import Clock
from functional_sd3.look.observe import observed
from functional_sd3.look.record import Evaluation
from functional_sd3.pipeline.draw import initial_state, sample_latents
from functional_sd3.pipeline.prepare import Prepared


class Run(NamedTuple):
    """Values of a `record.Record`, without the images."""

    times: Tensor
    states: Tensor
    denoised: Tensor
    velocities: Tensor
    evaluations: tuple[Evaluation, ...]
    seconds: tuple[float, ...]


def follow(transformer: Params, config: Config, prepared: Prepared, clock: Clock) -> Run:
    """The steps of an encoded request of one image. Raises ValueError where it has none (strength 0)."""
    request, sampling = prepared.request, prepared.request.sampling
    first = initial_state(transformer, config, prepared)
    states, times = [first.x], [first.t]
    denoised: list[Tensor] = []
    evaluations: list[Evaluation] = []
    seconds: list[float] = []

    def see(velocities: Velocities, guided: Tensor, t: Tensor) -> None:
        norms = {name: _norm(velocity) for name, velocity in velocities.items()}
        change = _norm(guided - velocities["positive"]) if "positive" in velocities else torch.zeros_like(_norm(guided))
        evaluations.append(Evaluation(len(denoised), t.flatten()[0], norms, _norm(guided), change))

    def keep(info: StepInfo) -> None:
        seconds.append(clock.begin("steps"))
        states.append(info.x)
        times.append(info.t)
        denoised.append(info.denoised)
        if sampling.on_step is not None:
            sampling.on_step(info)

    options: dict[str, Any] = {"on_step": keep}
    if request.field is None:
        guiding = guidances.cfg(sampling.cfg) if sampling.guidance is None else sampling.guidance
        options["guidance"] = observed(guiding, see)
    clock.begin("steps")
    sample_latents(
        transformer, config, prepared._replace(request=replace(request, sampling=replace(sampling, **options)))
    )
    if not denoised:
        raise ValueError(
            f"strength {request.start and request.start.strength} takes none of the {sampling.steps} steps: there is "
            "nothing to look at; give a larger strength, or more steps"
        )
    all_times = torch.stack([t.flatten()[0] for t in times])
    all_states, predicted = torch.cat(states), torch.cat(denoised)
    return Run(
        all_times,
        all_states,
        predicted,
        path.velocity_of(all_states[:-1], predicted, all_times[:-1].clamp_min(1e-12)),
        tuple(evaluations),
        tuple(seconds),
    )


def _norm(x: Tensor) -> Tensor:
    """Root mean square of the elements."""
    return x.float().square().mean().sqrt()
