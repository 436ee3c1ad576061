"""Images to draw, described as one frozen value: `prepare` encodes it, `draw` integrates and decodes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from functional_sd3.core.attention import Implementation
from functional_sd3.core.checks import check_channels
from functional_sd3.core.computation import BlockTransform as BlockTransform
from functional_sd3.core.types import Key
from functional_sd3.flow import caches, ode
from functional_sd3.flow.caches import Cache
from functional_sd3.flow.guidance import Guidance, check_scale
from functional_sd3.flow.ode.method import Method, StepInfo
from functional_sd3.lora.apply import Scale
from functional_sd3.lora.tree import Lora
from functional_sd3.pipeline import masks
from functional_sd3.pipeline.blending import Region
from functional_sd3.pipeline.fields import Field, velocity
from functional_sd3.pipeline.mixing import Mix, lerp
from functional_sd3.text.textual_inversion import Word
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt
from functional_sd3.transformer.mmdit import AttendBlocks

T = TypeVar("T")

Prompts = str | Sequence[str]
AnyMethod = Method | ode.Adaptive | str
"""A method, or the name of one (`ode.NAMES`)."""
OnStep = Callable[[StepInfo], Any]
Show = Callable[[StepInfo], Tensor]
Loras = Sequence[tuple[Lora, Scale]]
"""LoRAs with their scales, which add up."""

EDIT_ETA, EDIT_WINDOW, EDIT_SOURCE_CFG = 0.9, (0.0, 0.25), 1.0
"""Defaults of `edit`."""

FLOW_EDIT_STRENGTH, FLOW_EDIT_SOURCE_CFG, FLOW_EDIT_CFG, FLOW_EDIT_STEPS = 0.66, 3.5, 13.5, 50
"""Defaults of `flow_edit`: those of the paper for SD3."""


class AppliedLora(NamedTuple):
    """A LoRA and its strength, a number or a function of the path of the weight (`lora.apply`)."""

    lora: Lora
    scale: Scale = 1.0


def states(info: StepInfo) -> Tensor:
    """The state after a step."""
    return info.x


def denoised(info: StepInfo) -> Tensor:
    """The prediction of the data that a step started from."""
    return info.denoised


@dataclass(frozen=True)
class TextOptions:
    """Options of prompts: those of `conditioning.apply`, and what to keep away from ("" by default)."""

    negative: Prompts | None = None
    t5_length: int | None = None
    """Tokens that T5 reads; by default 256, or those of its tokenizer."""
    weighted: bool = False
    long_prompts: bool = False


@dataclass(frozen=True, eq=False)
class SamplingOptions:
    """Options of the integration of the flow: those of `sample`, which describes them."""

    steps: int = 28
    cfg: float | Tensor = 5.0
    guidance: Guidance | None = None
    method: AnyMethod | None = None
    """None for that of the model's scheduler config."""
    on_step: OnStep | None = None
    skip_layers: Sequence[int] = ()
    control: Sequence[Control] = ()
    image_prompt: ImagePrompt | None = None
    block_transform: BlockTransform | None = None
    attend: AttendBlocks | None = None
    implementation: Implementation = "sdpa"
    cache: Cache | str | None = None
    """None to compute every step; words are read (`caches.parse`)."""

    def __post_init__(self) -> None:
        check_scale(self.cfg, "cfg")
        if self.guidance is not None and not isinstance(self.guidance, Guidance):
            raise ValueError(f"guidance {self.guidance!r} must be a guidance.Guidance, such as guidance.cfg(5.0)")
        if isinstance(self.cache, str):
            object.__setattr__(self, "cache", caches.parse(self.cache))


@dataclass(frozen=True, eq=False)
class StartImages:
    """Images that a run starts from: (1 or batch, 3, height, width) in [0, 1].

    strength: the part of the steps that is taken, in [0, 1]. mask (1 or batch, 1, any height, any width of the images'
    proportions): 1 where the image is painted anew; `soften` and `restore` as in `inpaint`. posterior_key: draws the
    latents from the VAE's posterior, whose mean is taken by default.
    """

    images: Tensor
    strength: float = 1.0
    mask: Tensor | None = None
    soften: float | None = None
    restore: bool = False
    posterior_key: Key | None = None

    def __post_init__(self) -> None:
        check_channels("images", self.images, 3)
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength {self.strength} must be between 0 (the image as it is) and 1 (all noise)")
        if self.soften is not None:
            masks.check_blur(self.soften)


@dataclass(frozen=True, eq=False)
class Variation:
    """The keys of another noise, (2,) or (batch, 2), and how far towards it the noise is moved: () or (batch,)."""

    key: Key
    amount: float | Tensor = 0.2

    def __post_init__(self) -> None:
        if not isinstance(self.amount, Tensor) and not 0 <= self.amount <= 1:
            raise ValueError(f"amount {self.amount} must be between 0 (the noise as it is) and 1 (the other)")


@dataclass(frozen=True)
class Tiling:
    """Side and overlap in pixels of the tiles of an image; by default the model's own size, and a quarter of a side."""

    side: int | None = None
    overlap: int | None = None


@dataclass(frozen=True, eq=False)
class InversionEdit:
    """An edit by inversion (`edit`): the prompts of the images, and how their flow leads the way back."""

    source: Sequence[str]
    cfg: float | Tensor = EDIT_SOURCE_CFG
    eta: float | Tensor = EDIT_ETA
    window: tuple[float, float] = EDIT_WINDOW
    inversion: Callable[[Method], Method] | None = None

    def __post_init__(self) -> None:
        check_scale(self.cfg, "source_cfg")
        check_eta(self.eta)
        check_window(*self.window)


@dataclass(frozen=True, eq=False)
class FlowEdit:
    """An edit along the difference of two flows (`flow_edit`): the prompts of the images, and their guidance scale."""

    source: Sequence[str]
    cfg: float | Tensor = FLOW_EDIT_SOURCE_CFG
    averages: int = 1

    def __post_init__(self) -> None:
        check_scale(self.cfg, "source_cfg")
        if self.averages < 1:
            raise ValueError(f"averages {self.averages} must be at least 1")


@dataclass(frozen=True)
class Frames:
    """Images on the way from stop to stop: prompts and keys are the stops, `mix` mixes embeddings between them."""

    count: int = 8
    mix: Mix = lerp


@dataclass(frozen=True, eq=False)
class Request:
    """A batch of images to draw.

    prompts: one for each image, or for each stop of `frames`. key: (2,), from which sample i takes `fold_in(key, i)`,
    or (batch, 2), a key for each; only what draws noise needs one. height, width: in pixels, by default those of the
    start images, else the model's own size. noise: the starting latents (batch, channels, height / 8, width / 8)
    instead of the key's. field: makes the velocity of one prompt, as `velocity` does, which it is by default.
    loras: (LoRA, scale) of those added to the model; words: textual inversions, which the prompts may use.
    show: the latents to decode of every step (`states`, `denoised`), in place of the last state alone.
    Raises ValueError for parts that do not fit together, and for those that would have no effect.
    """

    prompts: Sequence[str]
    key: Key | None = None
    text: TextOptions = TextOptions()
    sampling: SamplingOptions = SamplingOptions()
    height: int | None = None
    width: int | None = None
    noise: Tensor | None = None
    variation: Variation | None = None
    start: StartImages | None = None
    regions: Sequence[Region] = ()
    tiling: Tiling | None = None
    edit: InversionEdit | FlowEdit | None = None
    frames: Frames | None = None
    field: Field | None = None
    loras: Loras = ()
    words: Sequence[Word] = ()
    show: Show | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", prompt_list(self.prompts))
        object.__setattr__(self, "loras", tuple(AppliedLora(*pair) for pair in self.loras))
        if not self.prompts:
            raise ValueError("there are no prompts; give a string or several, and an empty one for no prompt")
        if self.show is not None and (self.frames is not None or self.edit is not None):
            raise ValueError("the steps of frames and edits are not shown: leave out show")
        if self.frames is not None:
            self._check_frames(self.frames)
            self._check_effect()
            return
        if self.start is not None and len(self.start.images) not in (1, len(self.prompts)):
            count = len(self.start.images)
            raise ValueError(f"{count} images for {len(self.prompts)} prompts; give one, or one for each")
        if self.start is not None and self.start.mask is not None:
            height, width = self.start.images.shape[-2:]
            masks.check(self.start.mask, height, width, len(self.prompts))
        if self.edit is not None:
            if self.start is None:
                raise ValueError("an edit needs start images")
            if len(self.edit.source) != len(self.prompts):
                raise ValueError(f"{len(self.edit.source)} source prompts for {len(self.prompts)} prompts")
            if self.regions or self.tiling is not None:
                raise ValueError("an edit is of whole images: leave out regions and tiling")
        has_noise = self.noise is not None and self.edit is None
        if self.key is None and not has_noise and not isinstance(self.edit, InversionEdit):
            raise ValueError("a request needs a key, from which its noise is drawn, or the noise itself")
        if self.noise is not None and (self.noise.ndim != 4 or len(self.noise) != len(self.prompts)):
            shape = list(self.noise.shape)
            raise ValueError(
                f"noise {shape} must be ({len(self.prompts)}, channels, height, width): one for each prompt"
            )
        self._check_effect()

    def _check_effect(self) -> None:
        """Raises ValueError for parts that this kind of request would ignore."""
        start, ignored = self.start, []
        if start is not None and start.mask is None and (start.restore or start.soften is not None):
            raise ValueError("soften and restore are of a mask, and the start images have none")
        if self.edit is not None:
            ignored = [name for name in ("noise", "variation", "field") if getattr(self, name) is not None]
            ignored += ["mask"] if start is not None and start.mask is not None else []
        if isinstance(self.edit, InversionEdit) and start is not None and start.strength != 1:
            ignored.append(f"strength {start.strength}")
        if self.frames is not None and self.variation is not None:
            ignored.append("variation")
        if self.sampling.cache is not None and isinstance(self.edit, FlowEdit):
            raise ValueError("cache: FlowEdit draws new noise in every step, so no velocity says anything of the next")
        if self.sampling.cache is not None and isinstance(self.edit, InversionEdit) and self.edit.inversion:
            raise ValueError("cache: an exact inversion solves each step for its start, which needs its velocities")
        if ignored:
            kind = "frames" if self.frames is not None else f"an edit by {type(self.edit).__name__}"
            raise ValueError(f"{', '.join(ignored)} would have no effect on {kind}: leave out what it does not use")

    @property
    def is_bounded(self) -> bool:
        """True if the whole image is seen by one evaluation, whose table of positions then bounds its size."""
        return self.tiling is None and self.field in (None, velocity)

    def _check_frames(self, frames: Frames) -> None:
        if self.start is not None or self.edit is not None or self.regions or self.noise is not None:
            raise ValueError("frames are drawn between prompts and keys alone")
        if self.key is None:
            raise ValueError("frames need the keys of their stops, or one for all")
        keys = len(self.key) if self.key.ndim > 1 else 1
        stops = max(len(self.prompts), keys)
        if frames.count < 2 or stops < 2:
            raise ValueError(f"{frames.count} frames between {stops} stops; both must be at least 2")
        if {len(self.prompts), keys} - {1, stops}:
            raise ValueError(f"{keys} keys for {len(self.prompts)} prompts; give one, or one for each")


def needed(part: T | None, name: str) -> T:
    """A part of a request. Raises ValueError where it has none."""
    if part is None:
        raise ValueError(f"this request has no {name}, which drawing it needs")
    return part


def prompt_list(prompts: Prompts) -> list[str]:
    """Prompts as a list; a text is one prompt."""
    return [prompts] if isinstance(prompts, str) else list(prompts)


def broadcast_prompts(prompts: Prompts, images: Tensor) -> tuple[list[str], Tensor]:
    """Prompts and images (batch, 3, height, width) in equal numbers: one of either is repeated. Raises ValueError for
    other numbers."""
    prompts = prompt_list(prompts)
    check_channels("images", images, 3)
    counts = {len(prompts), len(images)} - {1}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts; give one, or one for each")
    count = max(len(prompts), len(images))
    return prompts * (count // len(prompts)), images.expand(count, *images.shape[1:])


def check_eta(eta: float | Tensor) -> None:
    """Raises ValueError for a number outside [0, 1]."""
    if not isinstance(eta, Tensor) and not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} must be between 0 (the flow alone) and 1 (straight to the image)")


def check_window(start: float, end: float) -> None:
    """Raises ValueError unless 0 <= start <= end <= 1."""
    if not 0 <= start <= end <= 1:
        raise ValueError(f"window {start} to {end} must be 0 <= start <= end <= 1: fractions of the run")
