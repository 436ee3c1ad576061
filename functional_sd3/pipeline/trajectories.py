"""The steps of a run as images."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key
from functional_sd3.flow.guidance import Guidance
from functional_sd3.flow.ode.method import StepInfo
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.adapters import with_loras
from functional_sd3.pipeline.components import Components, fetch
from functional_sd3.pipeline.draw import decode_latents, sample_latents
from functional_sd3.pipeline.prepare import Prepared, prepare
from functional_sd3.pipeline.request import (
    AnyMethod,
    BlockTransform,
    Loras,
    OnStep,
    Prompts,
    Request,
    SamplingOptions,
    TextOptions,
)
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt
from functional_sd3.weights.model import Tokenizers


def states(info: StepInfo) -> Tensor:
    """The state after a step."""
    return info.x


def denoised(info: StepInfo) -> Tensor:
    """The prediction of the data that a step started from."""
    return info.denoised


def trajectory(
    params: Components,
    config: Config,
    tokenizers: Tokenizers,
    prompts: Prompts,
    key: Key,
    *,
    show: Callable[[StepInfo], Tensor] = states,
    negative: Prompts | None = None,
    steps: int = 28,
    cfg: float | Tensor = 5.0,
    guidance: Guidance | None = None,
    height: int | None = None,
    width: int | None = None,
    method: AnyMethod | None = None,
    noise: Tensor | None = None,
    on_step: OnStep | None = None,
    t5_length: int | None = None,
    weighted: bool = False,
    long_prompts: bool = False,
    skip_layers: Sequence[int] = (),
    control: Sequence[Control] = (),
    image_prompt: ImagePrompt | None = None,
    block_transform: BlockTransform | None = None,
    implementation: Implementation = "sdpa",
    loras: Loras = (),
) -> Tensor:
    """The steps of `generate`: (steps, batch, 3, height, width) in [0, 1], float32, decoded step by step.

    show: the latents to decode of a step: `states` (the last is the image), `denoised`, or any other function of its
    `StepInfo`. The rest as of `generate`.
    """
    text = TextOptions(negative, t5_length, weighted, long_prompts)
    run = SamplingOptions(
        steps, cfg, guidance, method, on_step, skip_layers, control, image_prompt, block_transform, implementation
    )
    request = Request(prompts, key, text, run, height=height, width=width, noise=noise, loras=loras)
    return draw_steps(params, config, prepare(params, config, tokenizers, request), show)


def draw_steps(
    components: Components, config: Config, prepared: Prepared, show: Callable[[StepInfo], Tensor] = states
) -> Tensor:
    """What `show` takes of each step of an encoded request, decoded: (steps, batch, 3, height, width) in [0, 1]."""
    components, shown = with_loras(components, prepared.request.loras), list[Tensor]()
    sampling = prepared.request.sampling

    def keep(info: StepInfo) -> None:
        shown.append(show(info))
        if sampling.on_step is not None:
            sampling.on_step(info)

    prepared = prepared._replace(request=replace(prepared.request, sampling=replace(sampling, on_step=keep)))
    sample_latents({"transformer": fetch(components, "transformer")}, config, prepared)
    decoder = {"vae": fetch(components, "vae")}
    return torch.stack([decode_latents(decoder, config, prepared, latents) for latents in shown])
