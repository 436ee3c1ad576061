"""The components of SD3, by the names of their trees: one config for all of them, and the spec it describes."""

from dataclasses import dataclass

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

SPECS = {
    "clip_l": clip.spec,
    "clip_g": clip.spec,
    "t5": t5.spec,
    "transformer": mmdit.spec,
    "vae": vae.spec,
    "taesd": taesd.spec,
}
"""Component -> its `spec(config)`, in the order of the tree."""


@dataclass(frozen=True)
class Config:
    """The config of every component, None for those that are absent."""

    clip_l: ClipConfig | None = None
    clip_g: ClipConfig | None = None
    t5: T5Config | None = None
    transformer: TransformerConfig | None = None
    vae: VaeConfig | None = None
    schedule: ScheduleConfig | None = None
    taesd: TaesdConfig | None = None


def spec(config: Config) -> Tree:
    """One spec for every component that the config has: the description of `Model.params`."""
    present = {name: getattr(config, name) for name in SPECS}
    return {name: SPECS[name](part) for name, part in present.items() if part is not None}
