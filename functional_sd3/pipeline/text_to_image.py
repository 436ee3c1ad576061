"""From a prompt to an image, from prompts for regions, and in tiles.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"; the result of diffusers'
`StableDiffusion3Pipeline` for the same noise. Nothing is kept between calls, and all of it can be differentiated.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from functional_sd3 import weights
from functional_sd3.core import tree
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key
from functional_sd3.flow.caches import Cache
from functional_sd3.flow.guidance import Guidance
from functional_sd3.formats.default_dtype import Dtype
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.blending import Field, Region
from functional_sd3.pipeline.components import Components, move
from functional_sd3.pipeline.draw import draw
from functional_sd3.pipeline.fields import velocity
from functional_sd3.pipeline.prepare import prepare
from functional_sd3.pipeline.request import (
    AnyMethod,
    BlockTransform,
    Loras,
    OnStep,
    Prompts,
    Request,
    SamplingOptions,
    TextOptions,
    Tiling,
)
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt
from functional_sd3.transformer.mmdit import AttendBlocks
from functional_sd3.weights.model import Tokenizers


def generate(
    params: Components,
    config: Config,
    tokenizers: Tokenizers,
    prompts: Prompts,
    key: Key,
    *,
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
    offload: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Images of prompts: (batch, 3, height, width) in [0, 1], float32.

    key: (2,), from which sample i takes `fold_in(key, i)`, or (batch, 2), a key for each; noise: the starting latents
    (batch, channels, height / 8, width / 8) instead. negative: "" by default. cfg: guidance scale, 1 for none; a tensor
    () or (batch,) may be differentiated. guidance: another than `guidance.cfg(cfg)`, such as `guidance.apg(5.0)`;
    cfg is then not used. method: a method or the name of one; by default that of the model's scheduler config, as in
    `sample`. height, width: in pixels, by default the config's sample size. weighted, long_prompts: `(words:1.3)`
    weighs words, and CLIP reads on beyond its length (`conditioning`). control: ControlNets with their images, which
    `control_latents` encodes. image_prompt: an IP-Adapter with the features of an image.
    block_transform: applied to the function that applies a block of the transformer, such as `transform.compile`.
    attend: replaces the transformer's joint attention in every block or in some (`mmdit.apply`), in every evaluation,
    not that of ControlNets; its streams have the rows of all that guidance evaluates at once, those of the prompts
    first (docs/differentiation.md, "Attention of one's own").
    implementation: of the transformer's attention, as in `mmdit.apply`. cache: steps in which the velocity is not
    computed, of `flow.caches` or its words: "extrapolate:every=2", "fast" (docs/sampling.md, "Caches"). loras: (LoRA,
    scale) of those added to the model, lazily and component by component (`lora.apply`).

    offload: one component at a time: each text encoder, the transformer, the VAE, read when it is needed and dropped
    before the next, so that the peak is that of the largest. `params` may then also be a function from a component's
    name to its parameters, called once for each, such as `weights.fetcher(path)`. device: where to compute, by default
    where the parameters are; a tree's components are moved there, with `offload` each when it is read, and what
    `control` and `image_prompt` hold is the caller's to place. With gradients a graph holds on to the components, so
    `torch.no_grad()` belongs around an offloaded run.
    Raises ValueError for sizes that do not fit, a cfg that is not finite, and for a function of components without
    `offload`.
    """
    if offload:
        params = params if device is None else move(params, device)
    elif callable(params):
        raise ValueError("a function of components reads one after another: give offload=True, or their tree")
    elif device is not None:
        params = tree.to(params, device)
    text = TextOptions(negative, t5_length, weighted, long_prompts)
    run = SamplingOptions(
        steps, cfg, guidance, method, on_step, skip_layers, control, image_prompt, block_transform, attend,
        implementation, cache,
    )  # fmt: skip
    request = Request(prompts, key, text, run, height=height, width=width, noise=noise, loras=loras)
    return draw(params, config, prepare(params, config, tokenizers, request))


def generate_from(
    path: str | os.PathLike | Sequence[str | os.PathLike],
    prompts: Prompts,
    key: Key,
    *,
    dtype: Dtype = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    quantized: bool = False,
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
    """`generate` of the model at a path, with one component in memory at a time and without gradients.

    path, dtype, device, variant, quantized: as in `weights.load`, which reads each component when it is needed. The
    rest as in `generate`.
    """
    text = TextOptions(negative, t5_length, weighted, long_prompts)
    run = SamplingOptions(
        steps, cfg, guidance, method, on_step, skip_layers, control, image_prompt, block_transform, attend,
        implementation, cache,
    )  # fmt: skip
    request = Request(prompts, key, text, run, height=height, width=width, noise=noise, loras=loras)
    outline = weights.outline(path, variant=variant)
    fetch = weights.fetcher(path, dtype=dtype, device=device, variant=variant, quantized=quantized)
    with torch.no_grad():
        return draw(fetch, outline.config, prepare(fetch, outline.config, outline.tokenizers, request))


def regional(
    params: Components,
    config: Config,
    tokenizers: Tokenizers,
    prompts: Prompts,
    regions: Sequence[Region],
    key: Key,
    *,
    field: Field = velocity,
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
    """Images of prompts with prompts of their own in regions: (batch, 3, height, width) in [0, 1], float32.

    Where the regions' masks times their weights add up to less than 1, the rest is the image's own prompt's; where
    they add up to more, they share (`shares`). A region's prompt does not know of the others, and what it describes is
    lost where the noise leads elsewhere; so let the image's own prompt describe the whole, and keep it a share
    everywhere, which weights of 0.5 do. field: what makes the velocity of one prompt, such as `tiles(8)`. The rest as
    of `generate`; every region is evaluated at every step.
    """
    text = TextOptions(negative, t5_length, weighted, long_prompts)
    run = SamplingOptions(
        steps, cfg, guidance, method, on_step, skip_layers, control, image_prompt, block_transform, attend,
        implementation, cache,
    )  # fmt: skip
    request = Request(
        prompts,
        key,
        text,
        run,
        height=height,
        width=width,
        noise=noise,
        regions=tuple(regions),
        field=field,
        loras=loras,
    )
    return draw(params, config, prepare(params, config, tokenizers, request))


def tiled(
    params: Components,
    config: Config,
    tokenizers: Tokenizers,
    prompts: Prompts,
    key: Key,
    *,
    height: int,
    width: int,
    tile: int | None = None,
    overlap: int | None = None,
    negative: Prompts | None = None,
    steps: int = 28,
    cfg: float | Tensor = 5.0,
    guidance: Guidance | None = None,
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
    """Images of any size, larger than the table of positions too: (batch, 3, height, width) in [0, 1], float32.

    tile, overlap: of `tiles`, in pixels; the model's own size and a quarter of the tile by default. Decoded in tiles
    too. The rest as in `generate`.
    """
    text = TextOptions(negative, t5_length, weighted, long_prompts)
    run = SamplingOptions(
        steps, cfg, guidance, method, on_step, skip_layers, control, image_prompt, block_transform, attend,
        implementation, cache,
    )  # fmt: skip
    tiling = Tiling(tile, overlap)
    request = Request(prompts, key, text, run, height=height, width=width, noise=noise, tiling=tiling, loras=loras)
    return draw(params, config, prepare(params, config, tokenizers, request))
