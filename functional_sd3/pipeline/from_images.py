"""From images to images: started from noised images, behind a mask and beyond their borders.

Meng et al. 2022, "SDEdit", arXiv:2108.01073; the result of diffusers' `StableDiffusion3Img2ImgPipeline` for the same
noise and the mean of the VAE's posterior. `masks.keep_masked` is the mask.
"""

from collections.abc import Sequence

from torch import Tensor

from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key
from functional_sd3.flow.caches import Cache
from functional_sd3.flow.guidance import Guidance
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.components import Components
from functional_sd3.pipeline.draw import draw
from functional_sd3.pipeline.masks import extend_canvas
from functional_sd3.pipeline.prepare import prepare
from functional_sd3.pipeline.request import (
    AnyMethod,
    BlockTransform,
    Loras,
    OnStep,
    Prompts,
    Request,
    SamplingOptions,
    StartImages,
    TextOptions,
    broadcast_prompts,
)
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt
from functional_sd3.transformer.mmdit import AttendBlocks
from functional_sd3.weights.model import Tokenizers


def image_to_image(
    params: Components,
    config: Config,
    tokenizers: Tokenizers,
    prompts: Prompts,
    images: Tensor,
    key: Key,
    *,
    strength: float = 0.6,
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
    posterior_key: Key | None = None,
) -> Tensor:
    """Images of prompts, started from images: (batch, 3, height, width) in [0, 1], float32.

    images (batch, 3, height, width) in [0, 1]; one image or one prompt serves all of the other. strength, in [0, 1]:
    the part of the `steps` that is taken, rounded up to whole ones; 0 gives the images back, encoded and decoded, and
    1 is `generate`. Where steps * strength is a whole number it is that number of steps; diffusers computes it in
    binary fractions and takes one more in some cases (of 50 steps at 0.56 it takes 29, not 28). posterior_key: draws
    the latents from the VAE's posterior, as diffusers does; by default its mean is taken. The rest as in `generate`.

    Raises ValueError for a strength outside [0, 1], and for images of other shapes or numbers, or sizes that the model
    cannot draw.
    """
    text = TextOptions(negative, t5_length, weighted, long_prompts)
    run = SamplingOptions(
        steps, cfg, guidance, method, on_step, skip_layers, control, image_prompt, block_transform, attend,
        implementation, cache,
    )  # fmt: skip
    prompts, images = broadcast_prompts(prompts, images)
    start = StartImages(images, strength, posterior_key=posterior_key)
    request = Request(prompts, key, text, run, noise=noise, start=start, loras=loras)
    return draw(params, config, prepare(params, config, tokenizers, request))


def inpaint(
    params: Components,
    config: Config,
    tokenizers: Tokenizers,
    prompts: Prompts,
    images: Tensor,
    mask: Tensor,
    key: Key,
    *,
    strength: float = 1.0,
    soften: float | None = None,
    restore: bool = False,
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
    posterior_key: Key | None = None,
) -> Tensor:
    """Images painted anew where a mask is white: (batch, 3, height, width) in [0, 1], float32.

    mask (batch or 1, 1, any height, any width of the images' proportions), in [0, 1]. By default it is hard: what is
    at least half white is painted, each latent by the mask's pixel at its upper left (`masks.hard`). soften: takes
    grey for what lies between, a `strength` of its own for each latent (Levin and Fried 2023, arXiv:2306.00950), after
    a blur of so many pixels of the mask, 0 for none (`masks.soft`). restore: lays what is kept of the images over the
    result, pixel by pixel, since encoding and decoding alters it a little. The rest as in `image_to_image`; strength is
    1 here, which diffusers takes to be 0.6. Its latents are equal; its images are a little off, for it does not add
    the VAE's shift before it decodes (0.42).

    Raises ValueError as `image_to_image`, and for a mask of other proportions or another number.
    """
    text = TextOptions(negative, t5_length, weighted, long_prompts)
    run = SamplingOptions(
        steps, cfg, guidance, method, on_step, skip_layers, control, image_prompt, block_transform, attend,
        implementation, cache,
    )  # fmt: skip
    prompts, images = broadcast_prompts(prompts, images)
    start = StartImages(images, strength, mask.to(images), soften, restore, posterior_key)
    request = Request(prompts, key, text, run, noise=noise, start=start, loras=loras)
    return draw(params, config, prepare(params, config, tokenizers, request))


def outpaint(
    params: Components,
    config: Config,
    tokenizers: Tokenizers,
    prompts: Prompts,
    images: Tensor,
    key: Key,
    *,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    overlap: int = 0,
    strength: float = 1.0,
    soften: float | None = None,
    restore: bool = False,
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
    posterior_key: Key | None = None,
) -> Tensor:
    """Images continued beyond their borders by so many pixels: `inpaint` on a larger canvas.

    overlap: so many pixels inside the old border are painted anew too, for a seam that fits. The rest as in `inpaint`.
    Raises ValueError where the canvas is of a size that the model cannot draw.
    """
    text = TextOptions(negative, t5_length, weighted, long_prompts)
    run = SamplingOptions(
        steps, cfg, guidance, method, on_step, skip_layers, control, image_prompt, block_transform, attend,
        implementation, cache,
    )  # fmt: skip
    images, mask = extend_canvas(images, left=left, right=right, top=top, bottom=bottom, overlap=overlap)
    prompts, images = broadcast_prompts(prompts, images)
    start = StartImages(images, strength, mask, soften, restore, posterior_key)
    request = Request(prompts, key, text, run, noise=noise, start=start, loras=loras)
    return draw(params, config, prepare(params, config, tokenizers, request))
