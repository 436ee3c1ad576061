"""ControlNet for SD3 and SD3.5: a smaller transformer that maps a control image to residuals of the large one.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (arXiv:2302.05543). Two kinds, as in
diffusers' `SD3ControlNetModel`: with joint blocks, which read the prompt (InstantX, Alimama), and with DiT blocks of
the image alone, on the transformer's own patches and positions (Stability's "8b" files for SD3.5-large).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import computation, layers
from functional_sd3.core import spec as specs
from functional_sd3.core.attention import Implementation
from functional_sd3.core.checks import check_floating
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.transformer import joint_block, mmdit
from functional_sd3.transformer.checks import check_latents, check_shape
from functional_sd3.transformer.embeddings import (
    TIME_FREQUENCIES,
    embed_condition,
    embed_image,
    embed_patches,
    embedder_spec,
    position_spec,
)
from functional_sd3.transformer.head import embed_context, modulate_blocks, resolve_modulations

KINDS = ("blur", "canny", "depth", "pose", "tile", "inpaint")
"""Kinds of control image; Stability's files number the first three in this order."""


@dataclass(frozen=True)
class Config:
    """Sizes of a ControlNet; `SD35_LARGE` is that of the released files for SD3.5-large.

    context_width: None for blocks of the image alone. has_patch_embedding: False where the input is the transformer's
    embedded image tokens instead of latents; position_size: None without positions. extra_channels: of the control
    image, beyond those of the latents (a mask). zero_pooled: trained with a zero pooled embedding and with control
    latents that were not shifted; `apply` leaves both to its caller, as diffusers does. kind: one of `KINDS`, where
    known.
    """

    depth: int
    heads: int
    head_dim: int = 64
    patch_size: int = 2
    in_channels: int = 16
    extra_channels: int = 0
    context_width: int | None = 4096
    pooled_width: int = 2048
    has_patch_embedding: bool = True
    position_size: int | None = 192
    sample_size: int = 128
    qk_norm: bool = False
    dual_attention_layers: tuple[int, ...] = ()
    zero_pooled: bool = True
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} of ControlNet must be one of {', '.join(KINDS)}")

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


SD35_LARGE = Config(
    depth=19, heads=38, context_width=None, has_patch_embedding=False, position_size=None, zero_pooled=False
)


def spec(config: Config) -> Tree:
    """Parameter tree. The control image's patch embedding and the residual layers start at zero: no effect."""
    width, embedded = config.width, ("width", "channels")
    tree: dict[str, Any] = {}
    if config.has_patch_embedding:
        if config.position_size is not None:
            tree["position"] = position_spec(width, config.position_size, config.sample_size // config.patch_size)
        inputs = config.in_channels * config.patch_size**2
        uniform = specs.xavier_uniform(inputs, width)
        tree["patch"] = layers.conv2d_spec(config.in_channels, width, config.patch_size, init=uniform, axes=embedded)
    tree["time"] = embedder_spec(TIME_FREQUENCIES, width, "frequencies")
    tree["pooled"] = embedder_spec(config.pooled_width, width, "pooled")
    if config.context_width is not None:
        tree["context"] = joint_block.linear_spec(config.context_width, width, ("width", "context"))
    channels = config.in_channels + config.extra_channels
    return {
        **tree,
        "control_patch": layers.conv2d_spec(channels, width, config.patch_size, init=specs.zeros, axes=embedded),
        "blocks": [_block_spec(config, index) for index in range(config.depth)],
        "residuals": [joint_block.zero_linear_spec(width, width, ("width", "width")) for _ in range(config.depth)],
    }


def init(key: Key, config: Config, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
    """Initial parameters, whose residuals are zero; `from_transformer` starts from a trained transformer."""
    return specs.init(key, spec(config), dtype=dtype, device=device)


def apply(
    params: Params,
    config: Config,
    latents: Tensor,
    t: Tensor | None,
    context: Tensor | None,
    pooled: Tensor | None,
    image_latents: Tensor,
    scale: float | Tensor = 1.0,
    *,
    modulations: Tree | None = None,
    materialize: Callable[[Params], Params] | None = None,
    implementation: Implementation = "sdpa",
    block_transform: computation.BlockTransform | None = None,
) -> list[Tensor]:
    """One residual for each block, (batch, tokens, width), which `mmdit.apply(..., residuals=)` adds.

    latents (batch, in_channels, height, width), noised; for a ControlNet without patch embedding the transformer's
    tokens instead, `mmdit.embed_image`, (batch, tokens, width). t, context, pooled: as in `mmdit.apply`; without a
    context_width the context is not used and may be None. image_latents (batch or 1, in_channels + extra_channels,
    height, width): the encoded control image (`pipeline.control_latents`). scale: a number, or a tensor () or (batch,);
    0 gives residuals of exactly 0. modulations, materialize, implementation, block_transform: as in `mmdit.apply`.

    Raises ValueError when a shape fits neither the config nor the other inputs, or an input is not floating.
    """
    params = computation.materialize_rest(params, materialize)
    dtype = params["control_patch"]["weight"].dtype
    check_floating("latents", latents)
    check_floating("image_latents", image_latents)
    batch = latents.shape[0]
    image = embed(params, config, latents.to(dtype), image_latents.to(dtype))
    streams = {"image": image}
    if config.context_width is not None:
        streams["context"] = _embed_context(params, config.context_width, context, batch, dtype)
    modulation = resolve_modulations(modulations, partial(_conditions, params, config), t, pooled, batch)
    block_functions = computation.block_functions(
        joint_block.apply, materialize, block_transform, len(params["blocks"])
    )
    residuals = []
    blocks = zip(block_functions, params["blocks"], params["residuals"], modulation["blocks"], strict=True)
    for apply_block, block, out, parts in blocks:
        streams = apply_block(block, config.heads, streams, parts, implementation)
        residuals.append(_scaled(layers.linear(out, streams["image"]), scale))
    return residuals


def embed(params: Params, config: Config, latents: Tensor, image_latents: Tensor) -> Tensor:
    """Tokens (batch, tokens, width) of the noised latents plus those of the control image: the blocks' input."""
    check_latents("image_latents", image_latents, config.in_channels + config.extra_channels, config.patch_size)
    height, width = image_latents.shape[-2:]
    tokens = height * width // config.patch_size**2
    if latents.ndim == 4 and config.has_patch_embedding:
        check_latents("latents", latents, config.in_channels, config.patch_size)
        if latents.shape[-2:] != image_latents.shape[-2:]:
            size = " x ".join(map(str, latents.shape[-2:]))
            raise ValueError(f"the control image's latents are {height} x {width}, but the noised latents are {size}")
        if config.position_size is None:
            latents = embed_patches(params["patch"], config.patch_size, latents)
        else:
            latents = embed_image(params, config.patch_size, latents)
    elif latents.ndim == 4:
        raise ValueError(
            "this ControlNet has no patches of its own: instead of latents it takes the transformer's tokens, "
            "mmdit.embed_image(transformer, config, latents)"
        )
    check_shape("latents", latents, "(batch, tokens, width)", (None, tokens, config.width))
    if image_latents.shape[0] not in (1, latents.shape[0]):
        count, batch = image_latents.shape[0], latents.shape[0]
        raise ValueError(f"{count} control images for a batch of {batch}; give one, or as many")
    return latents + embed_patches(params["control_patch"], config.patch_size, image_latents)


def modulations(params: Params, config: Config, t: Tensor, pooled: Tensor) -> Tree:
    """Shifts, scales and gates of every block, for one step or for many: `mmdit.modulations` without "final"."""
    condition = embed_condition(params, config.pooled_width, t, pooled)
    return {"blocks": modulate_blocks(params["blocks"], condition)}


def from_transformer(key: Key, config: Config, transformer: Params, transformer_config: mmdit.Config) -> Params:
    """Initial parameters for training: copies of the transformer's embedders and first blocks, the others fresh.

    Raises ValueError when the two are of different widths, or the ControlNet is the deeper one.
    """
    like = transformer["patch"]["weight"]
    fresh = init(key, config, dtype=like.dtype, device=like.device)
    return copy_transformer(fresh, config, transformer, transformer_config)


def copy_transformer(fresh: Params, config: Config, transformer: Params, transformer_config: mmdit.Config) -> Params:
    """`from_transformer` with fresh parameters of the ControlNet, or parts of both."""
    if config.context_width is None:
        raise ValueError("a ControlNet of the image alone has no blocks like the transformer's to start from")
    sizes = ("heads", "head_dim", "patch_size", "in_channels", "context_width", "pooled_width", "qk_norm")
    for name in sizes:
        ours, theirs = getattr(config, name), getattr(transformer_config, name)
        if ours != theirs:
            raise ValueError(f"the ControlNet's {name} is {ours}, the transformer's {theirs}: nothing can be copied")
    # The context of the transformer's last block has no queries, output layer and MLP.
    if config.depth >= transformer_config.depth:
        raise ValueError(f"depth {config.depth} must be less than the transformer's {transformer_config.depth}")
    dual = tuple(index for index in transformer_config.dual_attention_layers if index < config.depth)
    if config.dual_attention_layers != dual:
        raise ValueError(f"dual_attention_layers {config.dual_attention_layers} must be the transformer's {dual}")
    copied: Params = {name: transformer[name] for name in ("patch", "time", "pooled", "context") if name in fresh}
    if config.position_size == transformer_config.position_size and "position" in fresh:
        copied["position"] = transformer["position"]
    copied["blocks"] = transformer["blocks"][: config.depth]
    return {name: copied.get(name, leaf) for name, leaf in fresh.items()}


def _block_spec(config: Config, index: int) -> Tree:
    if config.context_width is None:
        return {"image": joint_block.stream_spec(config.width, config.head_dim, qk_norm=False)}
    dual = index in config.dual_attention_layers
    return joint_block.spec(config.width, config.head_dim, qk_norm=config.qk_norm, dual=dual, last=False)


def _conditions(params: Params, config: Config, t: Tensor, pooled: Tensor) -> Tree:
    """The conditioning vector of every block, which makes its own modulations of it."""
    return {"blocks": [embed_condition(params, config.pooled_width, t, pooled)] * config.depth}


def _embed_context(params: Params, width: int, context: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor:
    if context is None:
        raise ValueError("this ControlNet reads the prompt: it needs a context")
    return embed_context(params, width, context, batch, dtype)


def _scaled(residual: Tensor, scale: float | Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        scale = scale.to(residual.dtype)
        scale = scale[:, None, None] if scale.ndim else scale
    return residual * scale
