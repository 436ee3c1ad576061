"""Dual encoder of CLIP: a text and an image encoder that project into one space.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3. Numerics of
transformers' `CLIPModel`. CLIP score and CMMD use it; SD3 itself needs text encoders only.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from functional_sd3.core import spec as specs
from functional_sd3.core.spec import Param
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.text import clip
from functional_sd3.text.clip import image as clip_image


@dataclass(frozen=True)
class Config:
    """Both encoders; `VIT_B32`, `VIT_L14` and `VIT_L14_336` are OpenAI's released ones."""

    text: clip.Config
    image: clip_image.Config

    def __post_init__(self) -> None:
        if self.text.projection_width != self.image.projection_width:
            raise ValueError(
                f"the text encoder projects to {self.text.projection_width} dimensions and the image encoder to "
                f"{self.image.projection_width}; they must share one space"
            )


VIT_B32 = Config(clip.CLIP_B, clip_image.VIT_B32)
VIT_L14 = Config(clip.CLIP_L, clip_image.VIT_L14)
VIT_L14_336 = Config(clip.CLIP_L, clip_image.VIT_L14_336)


def spec(config: Config) -> Tree:
    """The parameter tree: both encoders, and the logarithm of the inverse temperature of the similarities."""
    return {
        "text": clip.spec(config.text),
        "image": clip_image.spec(config.image),
        "logit_scale": Param((), specs.constant(math.log(1 / 0.07)), ()),
    }


def init(key: Key, config: Config, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
    """Initial parameters of `spec(config)`."""
    return specs.init(key, spec(config), dtype=dtype, device=device)


def text_embeddings(params: Params, config: Config, ids: Tensor) -> Tensor:
    """ids (batch, tokens) -> vectors of length 1, (batch, projection_width), in the parameters' dtype."""
    return _unit(clip.apply(params["text"], config.text, ids).projected)


def image_embeddings(params: Params, config: Config, images: Tensor) -> Tensor:
    """images (batch, 3, size, size), normalised as `clip_pixels.apply` does -> vectors of length 1."""
    return _unit(clip_image.apply(params["image"], config.image, images).projected)


def apply(params: Params, config: Config, ids: Tensor, images: Tensor) -> Tensor:
    """Logits (images, texts): the cosine of every image with every text, times exp(logit_scale)."""
    cosines = image_embeddings(params, config, images) @ text_embeddings(params, config, ids).T
    return cosines * params["logit_scale"].exp()


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
