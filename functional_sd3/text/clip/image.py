"""CLIP image encoders (vision transformers), as pure functions. `clip.image_apply` and so on.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.4: the vision
transformer of Dosovitskiy et al. 2021 with an additional norm before its first block, pooled at a learned class token.
Numerics of transformers' `CLIPVisionModelWithProjection`. Beside the text encoders because the two share their block.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core import spec as specs
from functional_sd3.core.attention import Implementation
from functional_sd3.core.checks import check_floating
from functional_sd3.core.spec import Param
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.text.clip import block as clip_block


@dataclass(frozen=True)
class Config:
    """Sizes of a CLIP image encoder; `VIT_B32`, `VIT_L14` and `VIT_L14_336` are OpenAI's released ones.

    `size`: side of the square images, in pixels; `patch`: side of a patch, which divides it.
    """

    size: int = 224
    patch: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"
    projection_width: int = 512
    eps: float = 1e-5

    def __post_init__(self) -> None:
        clip_block.check(self.width, self.heads, self.activation)
        if not 1 <= self.patch <= self.size:
            raise ValueError(f"patch {self.patch} must be between 1 and the size {self.size}")

    @property
    def tokens(self) -> int:
        """The class token and the patches; an incomplete last row or column of pixels is ignored."""
        return (self.size // self.patch) ** 2 + 1


VIT_B32 = Config()
VIT_L14 = Config(patch=14, width=1024, layers=24, heads=16, mlp_width=4096, projection_width=768)
VIT_L14_336 = Config(336, 14, 1024, 24, 16, 4096, projection_width=768)


class Output(NamedTuple):
    """Features of an image; token 0 is the class token, patches follow row by row.

    last (batch, tokens, width): after the last block, without a norm; penultimate (batch, tokens, width): the last
    block's input; pooled (batch, width): the class token after the final norm; projected (batch, projection_width):
    in the space the text encoder projects to.
    """

    last: Tensor
    penultimate: Tensor
    pooled: Tensor
    projected: Tensor


def spec(config: Config) -> Tree:
    """The parameter tree, with the initialisation of the CLIP paper's code."""
    width, narrow = config.width, specs.normal(config.width**-0.5)
    return {
        "class_embedding": Param((width,), narrow, ("width",)),
        "patch": {"weight": layers.conv2d_spec(3, width, config.patch, axes=("width", "channels"))["weight"]},
        "position_embedding": layers.embedding_spec(config.tokens, width, scale=width**-0.5, axis="positions"),
        "first_norm": layers.norm_spec(width),
        "blocks": [clip_block.spec(width, config.mlp_width, config.layers)] * config.layers,
        "final_norm": layers.norm_spec(width),
        "projection": layers.linear_spec(
            width, config.projection_width, bias=False, init=narrow, axes=("features", "width")
        ),
    }


def init(key: Key, config: Config, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
    """Initial parameters of `spec(config)`."""
    return specs.init(key, spec(config), dtype=dtype, device=device)


def apply(params: Params, config: Config, images: Tensor, *, implementation: Implementation = "sdpa") -> Output:
    """Encodes images (batch, 3, config.size, config.size), normalised as `clip_pixels.apply` does.

    The outputs have the parameters' dtype. Raises ValueError for images of another shape.
    """
    check_floating("images", images, ", normalised as clip_pixels.apply does")
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, config.size, config.size):
        raise ValueError(
            f"images have shape {list(images.shape)}; this encoder reads (batch, 3, {config.size}, {config.size})"
        )
    weight = params["patch"]["weight"]
    patches = F.conv2d(images.to(weight.dtype), weight, stride=config.patch).flatten(2).transpose(1, 2)
    class_token = params["class_embedding"].expand(len(images), 1, -1)
    x = torch.cat([class_token, patches], dim=1) + params["position_embedding"]["weight"]
    penultimate = x = layers.layer_norm(params["first_norm"], x, config.eps)
    for block in params["blocks"]:
        penultimate = x
        x = clip_block.apply(
            block, x, config.heads, config.activation, config.eps, causal=False, implementation=implementation
        )
    pooled = layers.layer_norm(params["final_norm"], x[:, 0], config.eps)
    return Output(x, penultimate, pooled, layers.linear(params["projection"], pooled))
