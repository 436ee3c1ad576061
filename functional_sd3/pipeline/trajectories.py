"""A run seen from step to step, as pictures."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core.types import Key, Params
from functional_sd3.flow.ode.method import StepInfo
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.image_to_image import divided
from functional_sd3.pipeline.latents import decode, initial_noise
from functional_sd3.pipeline.sampling import sample
from functional_sd3.pipeline.text_to_image import encode
from functional_sd3.weights.model import Tokenizers


def states(info: StepInfo) -> Tensor:
    """Where a step arrived."""
    return info.x


def denoised(info: StepInfo) -> Tensor:
    """The prediction of the picture that a step started from."""
    return info.denoised


def trajectory(
    params: Params,
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    key: Key,
    *,
    show: Callable[[StepInfo], Tensor] = states,
    noise: Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
    on_step: Callable[[StepInfo], Any] | None = None,
    **options: Any,
) -> Tensor:
    """What `generate` goes through: (steps, batch, 3, height, width) in [0, 1], float32, decoded step by step.

    show: what is seen of a step, latents of one: `states` (the last is the picture), `denoised`, or any other function
    of its `StepInfo`. The rest as of `generate`.
    """
    words, run = divided(options)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if noise is None:
        device = params["transformer"]["patch"]["weight"].device
        noise = initial_noise(key, config, len(prompts), height, width, device=device)
    seen: list[Tensor] = []

    def watch(info: StepInfo) -> None:
        seen.append(show(info))
        if on_step is not None:
            on_step(info)

    conditions = encode(params, config, tokenizers, prompts, **words)
    sample(params, config, conditions, noise, on_step=watch, key=key, **run)
    return torch.stack([decode(params, config, latents) for latents in seen])
