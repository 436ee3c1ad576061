"""TAESD, the tiny autoencoder of Ollin Boer Bohan, for SD3's latents: a fast approximation of the VAE, for previews.

https://github.com/madebyollin/taesd (no paper); numerics of diffusers' `AutoencoderTiny`. Its latents are the
transformer's: no scaling, no shift.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core import spec as specs
from functional_sd3.core.checks import check_channels, check_dtype, check_floating
from functional_sd3.core.types import Key, Params, Tree


@dataclass(frozen=True)
class Config:
    """Sizes of the autoencoder; `TAESD3` is the released one.

    `encoder_blocks` and `decoder_blocks`: residual blocks at every resolution, in the order they run.
    """

    width: int = 64
    latent_channels: int = 16
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)


TAESD3 = Config()


def factor(config: Config) -> int:
    """Downsampling factor per side: 8 for four resolutions."""
    return 2 ** (len(config.decoder_blocks) - 1)


def spec(config: Config) -> Tree:
    """Encoder and decoder; levels are in the order they run."""
    width = config.width
    return {
        "encoder": {
            "conv_in": layers.conv2d_spec(3, width, 3),
            "levels": [
                {**({"resample": _resample_spec(width)} if level else {}), "blocks": _blocks_spec(width, blocks)}
                for level, blocks in enumerate(config.encoder_blocks)
            ],
            "conv_out": layers.conv2d_spec(width, config.latent_channels, 3),
        },
        "decoder": {
            "conv_in": layers.conv2d_spec(config.latent_channels, width, 3),
            "levels": [
                {
                    "blocks": _blocks_spec(width, blocks),
                    **({"resample": _resample_spec(width)} if level + 1 < len(config.decoder_blocks) else {}),
                }
                for level, blocks in enumerate(config.decoder_blocks)
            ],
            "conv_out": layers.conv2d_spec(width, 3, 3),
        },
    }


def init(key: Key, config: Config, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
    """Initial parameters at PyTorch's default scale."""
    return specs.init(key, spec(config), dtype=dtype, device=device)


def encode(params: Params, config: Config, images: Tensor) -> Tensor:
    """images (batch, 3, height, width) in [-1, 1] -> latents (batch, latent_channels, height / factor, ...).

    Raises ValueError when the images are not such, or of another dtype than the parameters.
    """
    check_floating("images", images, ", in [-1, 1]: pixels.to_signed(pixels.from_bytes(images)) of bytes")
    check_channels("images", images, 3)
    params = params["encoder"]
    check_dtype("images", images, params["conv_in"])
    x = layers.conv2d(params["conv_in"], (images + 1) / 2, padding=1)
    for level in params["levels"]:
        if "resample" in level:
            x = F.conv2d(x, level["resample"]["weight"], stride=2, padding=1)
        x = _blocks(level["blocks"], x)
    return layers.conv2d(params["conv_out"], x, padding=1)


def decode(params: Params, config: Config, latents: Tensor) -> Tensor:
    """The transformer's latents (batch, latent_channels, h, w) -> images (batch, 3, factor * h, ...), about
    [-1, 1]. Raises ValueError when the latents have another number of channels, or another dtype than the parameters.
    """
    check_floating("latents", latents)
    check_channels("latents", latents, config.latent_channels)
    params = params["decoder"]
    check_dtype("latents", latents, params["conv_in"])
    # A soft clamp to [-3, 3].
    x = F.relu(layers.conv2d(params["conv_in"], torch.tanh(latents / 3) * 3, padding=1))
    for level in params["levels"]:
        x = _blocks(level["blocks"], x)
        if "resample" in level:
            x = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), level["resample"]["weight"], padding=1)
    return layers.conv2d(params["conv_out"], x, padding=1) * 2 - 1


def _blocks(blocks: list[Params], x: Tensor) -> Tensor:
    for block in blocks:
        h = F.relu(layers.conv2d(block["conv1"], x, padding=1))
        h = F.relu(layers.conv2d(block["conv2"], h, padding=1))
        x = F.relu(layers.conv2d(block["conv3"], h, padding=1) + x)
    return x


def _blocks_spec(width: int, count: int) -> list[Tree]:
    return [{name: layers.conv2d_spec(width, width, 3) for name in ("conv1", "conv2", "conv3")} for _ in range(count)]


def _resample_spec(width: int) -> Tree:
    return {"weight": layers.conv2d_spec(width, width, 3)["weight"]}
