"""CLIP's text encoder (`apply`), image encoder (`image_apply`) and the two together (`dual`), as pure functions.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".
"""

from functional_sd3.text.clip.block import ACTIVATIONS
from functional_sd3.text.clip.image import VIT_B32 as IMAGE_B32
from functional_sd3.text.clip.image import VIT_L14 as IMAGE_L14
from functional_sd3.text.clip.image import VIT_L14_336 as IMAGE_L14_336
from functional_sd3.text.clip.image import Config as ImageConfig
from functional_sd3.text.clip.image import Output as ImageOutput
from functional_sd3.text.clip.image import apply as image_apply
from functional_sd3.text.clip.image import init as image_init
from functional_sd3.text.clip.image import spec as image_spec
from functional_sd3.text.clip.text import CLIP_B, CLIP_G, CLIP_L, LEGACY_EOS_ID, Config, Output, apply, init, spec

__all__ = [
    "ACTIVATIONS",
    "CLIP_B",
    "CLIP_G",
    "CLIP_L",
    "Config",
    "IMAGE_B32",
    "IMAGE_L14",
    "IMAGE_L14_336",
    "ImageConfig",
    "ImageOutput",
    "LEGACY_EOS_ID",
    "Output",
    "apply",
    "image_apply",
    "image_init",
    "image_spec",
    "init",
    "spec",
]
