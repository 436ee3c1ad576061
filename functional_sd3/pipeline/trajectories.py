"""The steps of a run as images."""

from collections.abc import Sequence

from torch import Tensor

from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key
from functional_sd3.flow.caches import Cache
from functional_sd3.flow.guidance import Guidance
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.components import Components
from functional_sd3.pipeline.draw import draw
from functional_sd3.pipeline.prepare import prepare
from functional_sd3.pipeline.request import (
    AnyMethod,
    BlockTransform,
    Loras,
    OnStep,
    Prompts,
    Request,
    SamplingOptions,
    Show,
    TextOptions,
    states,
)
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt
from functional_sd3.transformer.mmdit import AttendBlocks
from functional_sd3.weights.model import Tokenizers


def trajectory(
    params: Components,
    config: Config,
    tokenizers: Tokenizers,
    prompts: Prompts,
    key: Key,
    *,
    show: Show = states,
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
    attend: AttendBlocks | None = None,
    implementation: Implementation = "sdpa",
    cache: Cache | str | None = None,
    loras: Loras = (),
) -> Tensor:
    """The steps of `generate`: (steps, batch, 3, height, width) in [0, 1], float32, decoded step by step.

    show: the latents to decode of a step: `states` (the last is the image), `denoised`, or any other function of its
    `StepInfo`. The rest as in `generate`.
    """
    text = TextOptions(negative, t5_length, weighted, long_prompts)
    run = SamplingOptions(
        steps, cfg, guidance, method, on_step, skip_layers, control, image_prompt, block_transform, attend,
        implementation, cache,
    )  # fmt: skip
    request = Request(prompts, key, text, run, height=height, width=width, noise=noise, loras=loras, show=show)
    return draw(params, config, prepare(params, config, tokenizers, request))
