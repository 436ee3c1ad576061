"""Multimodal diffusion transformer (MMDiT, MMDiT-X) of Stable Diffusion 3 and 3.5 as pure functions.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", section 4; MMDiT-X, which
gives some blocks a second attention over the image alone: the SD3.5-medium model card.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core import spec as specs
from functional_sd3.core.attention import Implementation, Stream, joint_attention, merge_heads
from functional_sd3.core.spec import Param
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.transformer.embeddings import crop_positions, position_table, time_sinusoid

TIME_FREQUENCIES = 256
MLP_RATIO = 4
EPS = 1e-6


@dataclass(frozen=True)
class Config:
    """Sizes of an MMDiT; `SD35_MEDIUM` and its friends below are the released ones.

    `position_size` is the side of the table of positions in patches, `sample_size` the side of the latents that the
    table's unit is taken from; blocks listed in `dual_attention_layers` attend a second time, over the image alone.
    """

    depth: int
    heads: int
    head_dim: int = 64
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    context_width: int = 4096
    pooled_width: int = 2048
    position_size: int = 192
    sample_size: int = 128
    qk_norm: bool = False
    dual_attention_layers: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


SD3_MEDIUM = Config(depth=24, heads=24)
SD35_MEDIUM = Config(depth=24, heads=24, position_size=384, qk_norm=True, dual_attention_layers=tuple(range(13)))
SD35_LARGE = Config(depth=38, heads=38, qk_norm=True)


def spec(config: Config) -> Tree:
    """Every parameter; initialised as DiT is (Peebles and Xie 2023): each block starts as the identity."""
    width = config.width
    patch_inputs = config.in_channels * config.patch_size**2
    return {
        "position": _position_spec(config),
        "patch": layers.conv2d_spec(
            config.in_channels, width, config.patch_size, init=specs.xavier_uniform(patch_inputs, width)
        ),
        "time": _embedder_spec(TIME_FREQUENCIES, width),
        "pooled": _embedder_spec(config.pooled_width, width),
        "context": _linear_spec(config.context_width, width),
        "blocks": [_block_spec(config, index) for index in range(config.depth)],
        "final": {
            "modulation": _zero_linear_spec(width, 2 * width),
            "out": _zero_linear_spec(width, config.out_channels * config.patch_size**2),
        },
    }


def init(
    key: Key, config: Config, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Params:
    """Fresh parameters; the velocity of a fresh network is zero."""
    return specs.init(key, spec(config), dtype=dtype, device=device)


def apply(
    params: Params,
    config: Config,
    latents: Tensor,
    t: Tensor | None,
    context: Tensor,
    pooled: Tensor | None,
    *,
    skip_layers: Collection[int] = (),
    residuals: Sequence[Tensor] = (),
    modulations: Tree | None = None,
    implementation: Implementation = "sdpa",
    block_transform: Callable[[Callable], Callable] | None = None,
) -> Tensor:
    """Velocity of the rectified flow at `latents`.

    latents (batch, in_channels, height, width); t () or (batch,) in [0, 1], 1 = noise; context (batch, tokens,
    context_width); pooled (batch, pooled_width). Returns (batch, out_channels, height, width) in the dtype of `latents`;
    the work is done in the dtype of the parameters.

    skip_layers: indices of blocks to leave out (skip-layer guidance).
    residuals: ControlNet's, each (batch, image tokens, width): spread evenly over the blocks and added to the image
        after each but the last, also after those skipped, as diffusers does.
    modulations: what `modulations` returned for this t and pooled, which may then be None.
    implementation: of attention; "math" has forward-mode derivatives and a batching rule for its backward.
    block_transform: applied to the function that applies one block, once a call: rematerialisation, or
        `functools.cache(torch.compile)` to compile one block instead of `depth` copies of it.

    Raises ValueError when a size does not fit the config, height or width is not a multiple of the patch size, or the
    grid of patches is larger than the table of positions.
    """
    _check_inputs(config, latents, context, pooled, skip_layers)
    if modulations is None:
        if t is None or pooled is None:
            raise ValueError("apply needs t and pooled, or the modulations computed from them")
        modulations = _modulations(params, t, pooled)
    apply_block = block_transform(block) if block_transform else block
    dtype = params["patch"]["weight"].dtype
    height, width = (side // config.patch_size for side in latents.shape[-2:])

    image = embed_image(params, config, latents.to(dtype))
    context = layers.linear(params["context"], context.to(dtype))
    for index, (weights, modulation) in enumerate(zip(params["blocks"], modulations["blocks"], strict=True)):
        if index not in skip_layers:
            image, context = apply_block(weights, config, image, context, modulation, implementation)
        if residuals and index < config.depth - 1:
            image = image + residuals[int(index / (config.depth / len(residuals)))].to(dtype)
    scale, shift = _split(modulations["final"], config.width)
    patches = layers.linear(params["final"]["out"], _modulate(_norm(image), shift, scale))
    velocity = rearrange(
        patches,
        "batch (h w) (p q c) -> batch c (h p) (w q)",
        h=height,
        w=width,
        p=config.patch_size,
        q=config.patch_size,
    )
    return velocity.to(latents.dtype)


def embed_image(params: Params, config: Config, latents: Tensor) -> Tensor:
    """Patches of `latents` (batch, in_channels, height, width), projected and placed: (batch, tokens, width)."""
    size = config.patch_size
    # A convolution whose stride is its kernel is a linear map of each patch.
    weight = {"weight": params["patch"]["weight"].flatten(1), "bias": params["patch"]["bias"]}
    patches = rearrange(latents, "batch c (h p) (w q) -> batch (h w) (c p q)", p=size, q=size)
    positions = crop_positions(params["position"], latents.shape[-2] // size, latents.shape[-1] // size)
    return (layers.linear(weight, patches) + positions).to(latents.dtype)


def modulations(params: Params, config: Config, t: Tensor, pooled: Tensor) -> Tree:
    """Shifts, scales and gates of every block: all that t and pooled have to say, for one step or for many at once.

    t () or (batch,), or (steps, batch) or (steps, 1) for all the steps of a run; pooled (batch, pooled_width). Returns
    {"blocks": [{"image", "context"}, ...], "final"} of tensors ([steps,] batch, n * width); `at` takes one step out.
    A third of the parameters is used nowhere else, so during a run they need not stay on the device.
    """
    _check_width("pooled", pooled, config.pooled_width)
    return _modulations(params, t, pooled)


def at(modulations: Tree, step: int) -> Tree:
    """One step of modulations computed for many: every tensor (steps, batch, ...) -> (batch, ...)."""
    blocks = [{stream: tensor[step] for stream, tensor in block.items()} for block in modulations["blocks"]]
    return {"blocks": blocks, "final": modulations["final"][step]}


def block(
    params: Params,
    config: Config,
    image: Tensor,
    context: Tensor,
    modulation: dict[str, Tensor],
    implementation: Implementation = "sdpa",
) -> tuple[Tensor, Tensor]:
    """One joint block: image and context (batch, tokens, width) -> the same.

    Where the parameters say nothing of what the context becomes (the last block), it is attended to and returned as it
    came.
    """
    image_parts = _split(modulation["image"], config.width)
    context_parts = _split(modulation["context"], config.width)
    last = "out" not in params["context"]["attention"]
    if last:
        context_scale, context_shift = context_parts
    else:
        context_shift, context_scale, context_gate, *context_mlp = context_parts
    image_shift, image_scale, image_gate, *image_mlp = image_parts[:6]

    normed = _norm(image)
    image_stream = _stream(params["image"]["attention"], config, _modulate(normed, image_shift, image_scale))
    context_normed = _modulate(_norm(context), context_shift, context_scale)
    context_stream = _stream(params["context"]["attention"], config, context_normed, asks=not last)
    attended, context_attended = joint_attention([image_stream, context_stream], implementation=implementation)
    image = _add_gated(image, image_gate, layers.linear(params["image"]["attention"]["out"], merge_heads(attended)))
    if "attention2" in params["image"]:
        shift, scale, gate = image_parts[6:]
        own = _stream(params["image"]["attention2"], config, _modulate(normed, shift, scale))
        (attended,) = joint_attention([own], implementation=implementation)
        image = _add_gated(image, gate, layers.linear(params["image"]["attention2"]["out"], merge_heads(attended)))
    image = _mlp(params["image"]["mlp"], image, *image_mlp)
    if last:
        return image, context
    out = layers.linear(params["context"]["attention"]["out"], merge_heads(context_attended))
    context = _add_gated(context, context_gate, out)
    return image, _mlp(params["context"]["mlp"], context, *context_mlp)


def _stream(params: Params, config: Config, x: Tensor, *, asks: bool = True) -> Stream:
    """Queries, keys and values (batch, heads, tokens, head_dim) of x (batch, tokens, width)."""
    if not asks:
        width = config.width
        keyed = {name: leaf[width:] for name, leaf in params["qkv"].items()}
        key, value = _heads(layers.linear(keyed, x), config, 2)
        return Stream(None, _qk_norm(params, "key_norm", key), value)
    query, key, value = _heads(layers.linear(params["qkv"], x), config, 3)
    return Stream(_qk_norm(params, "query_norm", query), _qk_norm(params, "key_norm", key), value)


def _heads(x: Tensor, config: Config, parts: int) -> Sequence[Tensor]:
    split = x.unflatten(-1, (parts, config.heads, config.head_dim))
    return [part.transpose(-3, -2) for part in split.unbind(-3)]


def _qk_norm(params: Params, name: str, x: Tensor) -> Tensor:
    return layers.rms_norm(params[name], x, EPS) if name in params else x


def _mlp(params: Params, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    hidden = layers.gelu_tanh(layers.linear(params["in"], _modulate(_norm(x), shift, scale)))
    return _add_gated(x, gate, layers.linear(params["out"], hidden))


def _norm(x: Tensor) -> Tensor:
    return layers.layer_norm({}, x, EPS)


def _split(modulation: Tensor, width: int) -> Sequence[Tensor]:
    """(batch, n * width) -> n times (batch, 1, width)."""
    return modulation.unsqueeze(-2).split(width, dim=-1)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, in one pass over x."""
    return torch.addcmul(shift, x, 1 + scale)


def _add_gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    return torch.addcmul(x, gate, update)


def _modulations(params: Params, t: Tensor, pooled: Tensor) -> Tree:
    dtype = params["time"]["in"]["weight"].dtype
    time = _embedder(params["time"], time_sinusoid(t, TIME_FREQUENCIES).to(dtype))
    condition = F.silu(time + _embedder(params["pooled"], pooled.to(dtype)))
    return {
        "blocks": [
            {stream: layers.linear(weights[stream]["modulation"], condition) for stream in ("image", "context")}
            for weights in params["blocks"]
        ],
        "final": layers.linear(params["final"]["modulation"], condition),
    }


def _embedder(params: Params, x: Tensor) -> Tensor:
    return layers.linear(params["out"], F.silu(layers.linear(params["in"], x)))


def _block_spec(config: Config, index: int) -> Tree:
    width = config.width
    last = index == config.depth - 1
    dual = index in config.dual_attention_layers
    image: dict[str, Any] = {
        "modulation": _zero_linear_spec(width, (9 if dual else 6) * width),
        "attention": _attention_spec(config),
    }
    if dual:
        image["attention2"] = _attention_spec(config)
    image["mlp"] = _mlp_spec(width)
    context = {
        "modulation": _zero_linear_spec(width, (2 if last else 6) * width),
        "attention": _attention_spec(config, out=not last),
    }
    if not last:
        context["mlp"] = _mlp_spec(width)
    return {"image": image, "context": context}


def _attention_spec(config: Config, *, out: bool = True) -> Tree:
    width = config.width
    # Three square matrices that are only stored as one.
    tree: dict[str, Any] = {"qkv": layers.linear_spec(width, 3 * width, init=specs.xavier_uniform(width, width))}
    if config.qk_norm:
        tree["query_norm"] = layers.norm_spec(config.head_dim, bias=False)
        tree["key_norm"] = layers.norm_spec(config.head_dim, bias=False)
    if out:
        tree["out"] = _linear_spec(width, width)
    return tree


def _mlp_spec(width: int) -> Tree:
    return {"in": _linear_spec(width, MLP_RATIO * width), "out": _linear_spec(MLP_RATIO * width, width)}


def _embedder_spec(inputs: int, width: int) -> Tree:
    normal = specs.normal(0.02)
    return {"in": layers.linear_spec(inputs, width, init=normal), "out": layers.linear_spec(width, width, init=normal)}


def _linear_spec(inputs: int, outputs: int) -> Tree:
    return layers.linear_spec(inputs, outputs, init=specs.xavier_uniform(inputs, outputs))


def _zero_linear_spec(inputs: int, outputs: int) -> Tree:
    return layers.linear_spec(inputs, outputs, init=specs.zeros)


def _position_spec(config: Config) -> Param:
    def table(key: Key, shape: tuple[int, ...]) -> Tensor:
        base_size = config.sample_size // config.patch_size
        return position_table(config.width, config.position_size, base_size).to(key.device)

    return Param((1, config.position_size**2, config.width), table, (None, None, "width"), trainable=False)


def _check_inputs(config, latents, context, pooled, skip_layers) -> None:
    if latents.ndim != 4 or latents.shape[1] != config.in_channels:
        raise ValueError(f"latents {list(latents.shape)} must be (batch, {config.in_channels}, height, width)")
    for name, side in zip(("height", "width"), latents.shape[-2:], strict=True):
        below = side // config.patch_size * config.patch_size
        if side != below:
            raise ValueError(
                f"latent {name} {side} is not a multiple of the patch size {config.patch_size}; "
                f"nearest are {below} and {below + config.patch_size}"
            )
    _check_width("context", context, config.context_width)
    if pooled is not None:
        _check_width("pooled", pooled, config.pooled_width)
    absent = sorted(index for index in skip_layers if not 0 <= index < config.depth)
    if absent:
        raise ValueError(f"skip_layers {absent} are not among the blocks 0 to {config.depth - 1}")


def _check_width(name: str, x: Tensor, width: int) -> None:
    if x.shape[-1] != width:
        raise ValueError(f"{name} {list(x.shape)} must end in {width}, the width that the config gives it")
