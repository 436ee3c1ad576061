"""Images with prompts of their own in regions, and images larger than the model can see at once."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key
from functional_sd3.flow import ode
from functional_sd3.flow.guidance import Guidance
from functional_sd3.flow.ode.method import Method, StepInfo
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.blending import Region
from functional_sd3.pipeline.components import Components
from functional_sd3.pipeline.draw import draw
from functional_sd3.pipeline.fields import Field, velocity
from functional_sd3.pipeline.prepare import prepare
from functional_sd3.pipeline.request import Request, SamplingOptions, TextOptions, Tiling
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt
from functional_sd3.weights.model import Tokenizers


def regional(
    params: Components,
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    regions: Sequence[Region],
    key: Key,
    *,
    field: Field = velocity,
    negative: str | Sequence[str] | None = None,
    steps: int = 28,
    cfg: float | Tensor = 5.0,
    guidance: Guidance | None = None,
    height: int | None = None,
    width: int | None = None,
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
        steps, cfg, guidance, method, on_step, skip_layers, control, image_prompt, block_transform, implementation
    )
    request = Request(
        prompts, key, text, run, height=height, width=width, noise=noise, regions=tuple(regions), field=field
    )
    return draw(params, config, prepare(params, config, tokenizers, request))


def tiled(
    params: Components,
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    key: Key,
    *,
    height: int,
    width: int,
    tile: int | None = None,
    overlap: int | None = None,
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
) -> Tensor:
    """Images of any size, larger than the table of positions too: (batch, 3, height, width) in [0, 1], float32.

    tile, overlap: of `tiles`, in pixels; the model's own size and a quarter of the tile by default. Decoded in tiles
    too. The rest as of `generate`.
    """
    text = TextOptions(negative, t5_length, weighted, long_prompts)
    run = SamplingOptions(
        steps, cfg, guidance, method, on_step, skip_layers, control, image_prompt, block_transform, implementation
    )
    tiling = Tiling(tile, overlap)
    request = Request(prompts, key, text, run, height=height, width=width, noise=noise, tiling=tiling)
    return draw(params, config, prepare(params, config, tokenizers, request))
