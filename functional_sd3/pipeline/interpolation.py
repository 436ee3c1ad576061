"""Images near an image, and images on the way from one prompt or seed to another."""

from collections.abc import Sequence

from torch import Tensor

from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key
from functional_sd3.flow.caches import Cache
from functional_sd3.flow.guidance import Guidance
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.components import Components
from functional_sd3.pipeline.draw import draw
from functional_sd3.pipeline.mixing import Mix, lerp
from functional_sd3.pipeline.prepare import prepare
from functional_sd3.pipeline.request import (
    AnyMethod,
    BlockTransform,
    Frames,
    Loras,
    OnStep,
    Prompts,
    Request,
    SamplingOptions,
    TextOptions,
    Variation,
    prompt_list,
)
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt
from functional_sd3.transformer.mmdit import AttendBlocks
from functional_sd3.weights.model import Tokenizers


def variations(
    params: Components,
    config: Config,
    tokenizers: Tokenizers,
    prompts: Prompts,
    key: Key,
    *,
    towards: Key,
    amount: float | Tensor = 0.2,
    negative: Prompts | None = None,
    steps: int = 28,
    cfg: float | Tensor = 5.0,
    guidance: Guidance | None = None,
    height: int | None = None,
    width: int | None = None,
    method: AnyMethod | None = None,
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
    """Images near those of a key: (batch, 3, height, width) in [0, 1], float32.

    The noise lies on the arc (`slerp`) from that of `key` to that of `towards`, both as in `generate`: amount 0 gives
    the images of the one, 1 of the other; () or (batch,). One prompt serves all keys. The rest as in `generate`.
    """
    text = TextOptions(negative, t5_length, weighted, long_prompts)
    run = SamplingOptions(
        steps, cfg, guidance, method, on_step, skip_layers, control, image_prompt, block_transform, attend,
        implementation, cache,
    )  # fmt: skip
    prompts = prompt_list(prompts)
    count = max(len(prompts), *(len(each) for each in (key, towards) if each.ndim > 1), 1)
    prompts = prompts * count if len(prompts) == 1 else prompts
    variation = Variation(towards, amount)
    request = Request(prompts, key, text, run, height=height, width=width, variation=variation, loras=loras)
    return draw(params, config, prepare(params, config, tokenizers, request))


def interpolate(
    params: Components,
    config: Config,
    tokenizers: Tokenizers,
    prompts: Prompts,
    keys: Key,
    *,
    frames: int = 8,
    mix: Mix = lerp,
    batch: int | None = None,
    negative: Prompts | None = None,
    steps: int = 28,
    cfg: float | Tensor = 5.0,
    guidance: Guidance | None = None,
    height: int | None = None,
    width: int | None = None,
    method: AnyMethod | None = None,
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
    """Images on the way from prompt to prompt, or seed to seed, or both: (frames, 3, height, width) in [0, 1].

    prompts, keys (2,) or (stops, 2): the stops, evenly far apart, the first and the last of them the first and the last
    frame; a single prompt, or a single key, stays the same throughout. Noise is mixed by `slerp`, embeddings by `mix`:
    `lerp` or `slerp`. batch: frames drawn at once, by default all. The inputs of a frame are a function of its place,
    which can be differentiated and vmapped: `between`. The rest as in `generate`.
    """
    text = TextOptions(negative, t5_length, weighted, long_prompts)
    run = SamplingOptions(
        steps, cfg, guidance, method, on_step, skip_layers, control, image_prompt, block_transform, attend,
        implementation, cache,
    )  # fmt: skip
    request = Request(prompts, keys, text, run, height=height, width=width, frames=Frames(frames, mix), loras=loras)
    return draw(params, config, prepare(params, config, tokenizers, request), batch=batch)
