"""From images to images: noise is added up to a level, and the flow of a prompt leads back from there.

Meng et al. 2022, "SDEdit", arXiv:2108.01073; the result of diffusers' `StableDiffusion3Img2ImgPipeline` for the same
noise and the mean of the VAE's posterior.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key
from functional_sd3.flow import ode
from functional_sd3.flow.guidance import Guidance
from functional_sd3.flow.ode.method import Method, StepInfo
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.components import Components
from functional_sd3.pipeline.draw import draw
from functional_sd3.pipeline.prepare import prepare
from functional_sd3.pipeline.request import Request, SamplingOptions, StartImages, TextOptions, broadcast_prompts
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt
from functional_sd3.weights.model import Tokenizers


def image_to_image(
    params: Components,
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    images: Tensor,
    key: Key,
    *,
    strength: float = 0.6,
    negative: str | Sequence[str] | None = None,
    steps: int = 28,
    cfg: float | Tensor = 5.0,
    guidance: Guidance | None = None,
    method: Method | ode.Adaptive | str | None = None,
    noise: Tensor | None = None,
    on_step: Callable[[StepInfo], Any] | None = None,
    t5_length: int | None = None,
    weighted: bool = False,
    long_prompts: bool = False,
    skip_layers: Sequence[int] = (),
    control: Sequence[Control] = (),
    image_prompt: ImagePrompt | None = None,
    block_transform: Callable[[Callable], Callable] | None = None,
    implementation: Implementation = "sdpa",
    posterior_key: Key | None = None,
) -> Tensor:
    """Images of prompts, started from images: (batch, 3, height, width) in [0, 1], float32.

    images (batch, 3, height, width) in [0, 1]; one image or one prompt serves all of the other. strength, in [0, 1]:
    the part of the `steps` that is taken, rounded up to whole ones; 0 gives the images back, encoded and decoded, and
    1 is `generate`. Where steps * strength is a whole number it is that number of steps; diffusers computes it in
    binary fractions and takes one more in some cases (of 50 steps at 0.56 it takes 29, not 28). posterior_key: draws
    the latents from the VAE's posterior, as diffusers does; by default its mean is taken. The rest as of `generate`.

    Raises ValueError for a strength outside [0, 1], and for images of other shapes or numbers, or sizes that the model
    cannot draw.
    """
    text = TextOptions(negative, t5_length, weighted, long_prompts)
    run = SamplingOptions(
        steps, cfg, guidance, method, on_step, skip_layers, control, image_prompt, block_transform, implementation
    )
    prompts, images = broadcast_prompts(prompts, images)
    start = StartImages(images, strength, posterior_key=posterior_key)
    request = Request(prompts, key, text, run, noise=noise, start=start)
    return draw(params, config, prepare(params, config, tokenizers, request))
