"""The 16-channel variational autoencoder of Stable Diffusion 3, which downsamples images by 8 per side.

Kingma and Welling 2014, "Auto-Encoding Variational Bayes"; Rombach et al. 2022, "High-Resolution Image Synthesis with
Latent Diffusion Models"; sizes and constants of SD3's file.
Keeps the behaviour of diffusers' `AutoencoderKL` without quantisation convolutions.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from functional_sd3.core import blend, layers, prng
from functional_sd3.core import spec as specs
from functional_sd3.core.attention import Implementation, attention
from functional_sd3.core.checks import check_channels, check_component, check_dtype, check_floating
from functional_sd3.core.types import Key, Params, Tree


@dataclass(frozen=True)
class Config:
    """Sizes of the autoencoder; `SD3_VAE` is the released one.

    channels: of each level, from full resolution to the latents'. scaling and shift: normalize latents for the
    transformer. sample_size: the side of the training images in pixels.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks_per_level: int = 2
    latent_channels: int = 16
    groups: int = 32
    scaling: float = 1.5305
    shift: float = 0.0609
    eps: float = 1e-6
    sample_size: int = 1024


SD3_VAE = Config()


class Posterior(NamedTuple):
    """Gaussian posterior q(z | x) of the latents; both (batch, latent_channels, height / factor, width / factor)."""

    mean: Tensor
    logvar: Tensor


def factor(config: Config) -> int:
    """Downsampling factor per side: 8 for four levels."""
    return 2 ** (len(config.channels) - 1)


def spec(config: Config) -> Tree:
    """Encoder and decoder; the decoder's levels are in the order they run, lowest resolution first."""
    return {"encoder": _encoder_spec(config), "decoder": _decoder_spec(config)}


def init(key: Key, config: Config, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
    """Initial parameters: PyTorch's default scale, but every residual branch starts at zero, which trains much
    faster."""
    return specs.init(key, spec(config), dtype=dtype, device=device)


def encode(params: Params, config: Config, images: Tensor, *, implementation: Implementation = "sdpa") -> Posterior:
    """images (batch, 3, height, width) in [-1, 1] -> Posterior of unnormalised latents; logvar clamped to [-30, 20].

    Raises ValueError when height or width is not a multiple of `factor(config)`, or the dtype not the parameters'.
    """
    check_component("vae.encode", "vae", params, "encoder", config, "latent_channels")
    _check_images(config, images)
    params = params["encoder"]
    check_dtype("images", images, params["conv_in"])
    x = layers.conv2d(params["conv_in"], layers.image_layout(images), padding=1)
    for level in params["levels"]:
        for block in level["blocks"]:
            x = layers.residual_block(block, x, config.groups, config.eps)
        if "resample" in level:
            # Padded at the right and bottom only, as the released weights were trained.
            x = layers.conv2d(level["resample"], F.pad(x, (0, 1, 0, 1)), stride=2)
    x = _middle(params["middle"], config, x, implementation)
    x = layers.group_norm_silu(params["norm_out"], x, config.groups, config.eps)
    mean, logvar = layers.conv2d(params["conv_out"], x, padding=1).contiguous().chunk(2, dim=1)
    return Posterior(mean, logvar.clamp(-30.0, 20.0))


def decode(params: Params, config: Config, latents: Tensor, *, implementation: Implementation = "sdpa") -> Tensor:
    """Unnormalised latents (batch, latent_channels, h, w) -> images (batch, 3, factor * h, factor * w), about [-1, 1].

    Raises ValueError when the latents have another number of channels, or another dtype than the parameters.
    """
    check_component("vae.decode", "vae", params, "decoder", config, "latent_channels")
    check_floating("latents", latents)
    check_channels("latents", latents, config.latent_channels)
    params = params["decoder"]
    check_dtype("latents", latents, params["conv_in"])
    x = layers.conv2d(params["conv_in"], layers.image_layout(latents), padding=1)
    x = _middle(params["middle"], config, x, implementation)
    for level in params["levels"]:
        for block in level["blocks"]:
            x = layers.residual_block(block, x, config.groups, config.eps)
        if "resample" in level:
            x = layers.upsample_conv2d(level["resample"], x)
    x = layers.group_norm_silu(params["norm_out"], x, config.groups, config.eps)
    return layers.conv2d(params["conv_out"], x, padding=1).contiguous()


def decode_tiled(params: Params, config: Config, latents: Tensor, *, tile: int = 64, overlap: int = 16) -> Tensor:
    """`decode` in overlapping tiles, blended linearly: memory grows with the tile, not with the image.

    Latents (batch, latent_channels, h, w) -> images (batch, 3, factor * h, factor * w). `tile` and `overlap` are sides
    in latents, 0 <= overlap < tile. Near seams the result differs a little from `decode`, whose middle attention is
    over the whole image. An image no larger than a tile is decoded whole. The tiles are summed in float32 at least; the
    result has the dtype of `decode`.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap {overlap} must be at least 0 and below the tile size {tile}")
    height, width = latents.shape[-2:]
    scale = factor(config)
    dtype = torch.promote_types(latents.dtype, torch.float32)
    total = latents.new_zeros(latents.shape[0], 3, height * scale, width * scale, dtype=dtype)
    weight = latents.new_zeros(height * scale, width * scale, dtype=dtype)
    for top in _tile_starts(height, tile, overlap):
        for left in _tile_starts(width, tile, overlap):
            bottom, right = min(top + tile, height), min(left + tile, width)
            part = decode(params, config, latents[..., top:bottom, left:right])
            seam = overlap * scale
            ramp = torch.outer(
                blend.ramp((bottom - top) * scale, seam, rises=top > 0, falls=bottom < height, like=weight),
                blend.ramp((right - left) * scale, seam, rises=left > 0, falls=right < width, like=weight),
            )
            window = (slice(top * scale, bottom * scale), slice(left * scale, right * scale))
            total[(..., *window)] += part * ramp
            weight[window] += ramp
    return (total / weight).to(latents.dtype)


def sample(posterior: Posterior, key: Key) -> Tensor:
    """A sample of the posterior, reparameterised: mean + exp(logvar / 2) * noise."""
    noise = prng.normal(key, posterior.mean.shape, dtype=posterior.mean.dtype)
    return posterior.mean + torch.exp(0.5 * posterior.logvar) * noise


def normalize(config: Config, latents: Tensor) -> Tensor:
    """(latents - shift) * scaling, of any shape: latents in the transformer's range."""
    return (latents - config.shift) * config.scaling


def denormalize(config: Config, latents: Tensor) -> Tensor:
    """latents / scaling + shift, of any shape: unnormalised latents, as `decode` takes them."""
    return latents / config.scaling + config.shift


def _check_images(config: Config, images: Tensor) -> None:
    check_floating("images", images, ", in [-1, 1]: pixels.to_signed(pixels.from_bytes(images)) of bytes")
    check_channels("images", images, 3)
    multiple = factor(config)
    for name, size in zip(("height", "width"), images.shape[-2:], strict=True):
        if size == 0 or size % multiple:
            low = size // multiple * multiple
            nearest = f"{low} and {low + multiple}" if low else f"{multiple}"
            raise ValueError(f"{name} {size} is not a multiple of {multiple}; nearest are {nearest}")


def _middle(params: Params, config: Config, x: Tensor, implementation: Implementation) -> Tensor:
    x = layers.residual_block(params["block1"], x, config.groups, config.eps)
    x = x + _middle_attention(params["attention"], config, x, implementation)
    return layers.residual_block(params["block2"], x, config.groups, config.eps)


def _middle_attention(params: Params, config: Config, x: Tensor, implementation: Implementation) -> Tensor:
    height = x.shape[-2]
    h = layers.group_norm(params["norm"], x, config.groups, config.eps)
    h = rearrange(h, "batch channels height width -> batch (height width) channels")
    query, key, value = rearrange(
        layers.linear(params["qkv"], h), "batch tokens (three channels) -> three batch 1 tokens channels", three=3
    )
    h = attention(query, key, value, implementation=implementation).squeeze(1)
    return rearrange(
        layers.linear(params["out"], h), "batch (height width) channels -> batch channels height width", height=height
    )


def _tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _middle_spec(channels: int) -> Tree:
    return {
        "block1": layers.residual_block_spec(channels, channels),
        "attention": {
            "norm": layers.norm_spec(channels, axis="channels"),
            "qkv": layers.linear_spec(channels, 3 * channels, axes=("channels", "channels")),  # one head
            "out": layers.linear_spec(channels, channels, init=specs.zeros, axes=("channels", "channels")),
        },
        "block2": layers.residual_block_spec(channels, channels),
    }


def _levels_spec(widths: tuple[int, ...], inputs: int, blocks: int) -> list[Tree]:
    levels = []
    for index, width in enumerate(widths):
        sizes = [(inputs if block == 0 else width, width) for block in range(blocks)]
        level: Tree = {"blocks": [layers.residual_block_spec(*each) for each in sizes]}
        if index + 1 < len(widths):
            level["resample"] = layers.conv2d_spec(width, width, 3)
        levels.append(level)
        inputs = width
    return levels


def _encoder_spec(config: Config) -> Tree:
    first, last = config.channels[0], config.channels[-1]
    return {
        "conv_in": layers.conv2d_spec(3, first, 3),
        "levels": _levels_spec(config.channels, first, config.blocks_per_level),
        "middle": _middle_spec(last),
        "norm_out": layers.norm_spec(last, axis="channels"),
        "conv_out": layers.conv2d_spec(last, 2 * config.latent_channels, 3),
    }


def _decoder_spec(config: Config) -> Tree:
    first, last = config.channels[0], config.channels[-1]
    return {
        "conv_in": layers.conv2d_spec(config.latent_channels, last, 3),
        "middle": _middle_spec(last),
        "levels": _levels_spec(config.channels[::-1], last, config.blocks_per_level + 1),
        "norm_out": layers.norm_spec(first, axis="channels"),
        "conv_out": layers.conv2d_spec(first, 3, 3),
    }
