"""The components of SD3, by the names of their trees: one config for all of them, and the spec it describes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from functional_sd3.core.computation import Computation
from functional_sd3.core.types import Tree
from functional_sd3.flow.schedule import Config as ScheduleConfig
from functional_sd3.image import taesd, vae
from functional_sd3.image.taesd import Config as TaesdConfig
from functional_sd3.image.vae import Config as VaeConfig
from functional_sd3.text import clip, t5
from functional_sd3.text.clip import Config as ClipConfig
from functional_sd3.text.t5 import Config as T5Config
from functional_sd3.transformer import mmdit
from functional_sd3.transformer.mmdit import Config as TransformerConfig

SPECS: dict[str, Callable[[Any], Tree]] = {
    "clip_l": clip.spec,
    "clip_g": clip.spec,
    "t5": t5.spec,
    "transformer": mmdit.spec,
    "vae": vae.spec,
    "taesd": taesd.spec,
}
"""Component -> its `spec(config)`, in the order of the tree."""


WHERE = {
    "clip_l": "text_encoder/, clip_l.safetensors, an all-in-one file",
    "clip_g": "text_encoder_2/, clip_g.safetensors, an all-in-one file",
    "t5": "text_encoder_3/, t5xxl.safetensors, an all-in-one file; SD3 also works without",
    "transformer": "transformer/, a file of Stability's",
    "vae": "vae/, a file of Stability's, a stand-alone VAE",
    "taesd": "taesd3, a repository of its own",
}
"""Component -> the files in which it is found, for messages."""


@dataclass(frozen=True)
class Config:
    """The config of every component, None for those that are absent.

    computations: component -> how its blocks are computed (`core.computation`); no part of what the model is.
    """

    clip_l: ClipConfig | None = None
    clip_g: ClipConfig | None = None
    t5: T5Config | None = None
    transformer: TransformerConfig | None = None
    vae: VaeConfig | None = None
    schedule: ScheduleConfig | None = None
    taesd: TaesdConfig | None = None
    computations: Mapping[str, Computation] = field(default_factory=dict, compare=False, repr=False)


@overload
def require(config: Config, name: Literal["clip_l", "clip_g"]) -> ClipConfig: ...
@overload
def require(config: Config, name: Literal["t5"]) -> T5Config: ...
@overload
def require(config: Config, name: Literal["transformer"]) -> TransformerConfig: ...
@overload
def require(config: Config, name: Literal["vae"]) -> VaeConfig: ...
@overload
def require(config: Config, name: Literal["taesd"]) -> TaesdConfig: ...


def require(config: Config, name: str) -> Any:
    """The config of a component. Raises ValueError, naming its usual files, for a model without."""
    part = getattr(config, name)
    if part is None:
        raise ValueError(f"this model has no {name} (found in: {WHERE[name]})")
    return part


def spec(config: Config) -> Tree:
    """One spec for every component that the config has: the description of `Model.params`."""
    present = {name: getattr(config, name) for name in SPECS}
    return {name: SPECS[name](part) for name, part in present.items() if part is not None}
