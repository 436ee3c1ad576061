"""Images of one prompt turned into images of another, by inversion or by FlowEdit; `edits` has the two algorithms.

Rout et al. 2024, "RF inversion", arXiv:2410.10792; Kulikov et al. 2024, "FlowEdit", arXiv:2412.08629.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key
from functional_sd3.flow import ode
from functional_sd3.flow.caches import Cache
from functional_sd3.flow.guidance import Guidance
from functional_sd3.flow.ode.method import Method
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.components import Components
from functional_sd3.pipeline.draw import draw
from functional_sd3.pipeline.prepare import prepare
from functional_sd3.pipeline.request import (
    EDIT_ETA,
    EDIT_SOURCE_CFG,
    EDIT_WINDOW,
    FLOW_EDIT_CFG,
    FLOW_EDIT_SOURCE_CFG,
    FLOW_EDIT_STEPS,
    FLOW_EDIT_STRENGTH,
    AnyMethod,
    BlockTransform,
    FlowEdit,
    InversionEdit,
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


def edit(
    params: Components,
    config: Config,
    tokenizers: Tokenizers,
    source: Prompts,
    target: Prompts,
    images: Tensor,
    *,
    eta: float | Tensor = EDIT_ETA,
    window: tuple[float, float] = EDIT_WINDOW,
    source_cfg: float | Tensor = EDIT_SOURCE_CFG,
    inversion: Callable[[Method], Method] | None = None,
    negative: Prompts | None = None,
    steps: int = 28,
    cfg: float | Tensor = 5.0,
    guidance: Guidance | None = None,
    method: AnyMethod | None = ode.EULER,
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
    """Images of the source prompts turned into images of the target prompts: (batch, 3, height, width) in [0, 1].

    images (batch, 3, height, width) in [0, 1] of the source prompts are inverted: the flow of the source, guided by
    `source_cfg`, is followed from data to noise. The flow of the target, guided by `cfg`, leads back. It is pulled to
    the images by `eta` in [0, 1] (`pull_to`; () or (batch,)) during the steps of `window`, fractions of the run, like a
    ControlNet's: 0 is the target's flow alone, 1 up to the end gives the images back. inversion: as in
    `invert_latents`. The rest as in `generate`, for both runs, but for `guidance`, which is the target's; the method is
    Euler's by default, since a run that draws noise leads back to nothing.

    Raises ValueError for an eta or window outside [0, 1], and as `image_to_image`.
    """
    text = TextOptions(negative, t5_length, weighted, long_prompts)
    run = SamplingOptions(
        steps, cfg, guidance, method, on_step, skip_layers, control, image_prompt, block_transform, attend,
        implementation, cache,
    )  # fmt: skip
    source, target, images = _broadcast(source, target, images)
    request = Request(
        target,
        text=text,
        sampling=run,
        start=StartImages(images, posterior_key=posterior_key),
        edit=InversionEdit(source, source_cfg, eta, window, inversion),
        loras=loras,
    )
    return draw(params, config, prepare(params, config, tokenizers, request))


def flow_edit(
    params: Components,
    config: Config,
    tokenizers: Tokenizers,
    source: Prompts,
    target: Prompts,
    images: Tensor,
    key: Key,
    *,
    strength: float = FLOW_EDIT_STRENGTH,
    source_cfg: float | Tensor = FLOW_EDIT_SOURCE_CFG,
    averages: int = 1,
    negative: Prompts | None = None,
    steps: int = FLOW_EDIT_STEPS,
    cfg: float | Tensor = FLOW_EDIT_CFG,
    guidance: Guidance | None = None,
    method: AnyMethod | None = ode.EULER,
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
    """Images of the source prompts turned into images of the target prompts, without inversion: FlowEdit.

    Returns (batch, 3, height, width) in [0, 1], float32. The image z itself moves, along
    v_target(z + x_t - x_0, t) - v_source(x_t, t) with x_t = (1 - t) x_0 + t noise, the mean over `averages` noises, new
    ones at every time from `key`. strength: the part of the steps that is taken, n_max / T of the paper, whose values
    for SD3 are the defaults; 0 gives the images back. With the same prompts and scales nothing moves. The rest as in
    `generate`; `guidance` is the target's, and the method is Euler's by default.
    """
    text = TextOptions(negative, t5_length, weighted, long_prompts)
    run = SamplingOptions(
        steps, cfg, guidance, method, on_step, skip_layers, control, image_prompt, block_transform, attend,
        implementation, cache,
    )  # fmt: skip
    source, target, images = _broadcast(source, target, images)
    start, flow = StartImages(images, strength, posterior_key=posterior_key), FlowEdit(source, source_cfg, averages)
    request = Request(target, key, text, run, start=start, edit=flow, loras=loras)
    return draw(params, config, prepare(params, config, tokenizers, request))


def _broadcast(source: Prompts, target: Prompts, images: Tensor) -> tuple[list[str], list[str], Tensor]:
    """Source prompts, target prompts and images, broadcast to equal numbers."""
    # The source twice: the target may have brought more images.
    source, images = broadcast_prompts(source, images)
    target, images = broadcast_prompts(target, images)
    source, images = broadcast_prompts(source, images)
    return source, target, images
