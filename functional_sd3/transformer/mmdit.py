"""Multimodal diffusion transformer (MMDiT, MMDiT-X) of Stable Diffusion 3 and 3.5 as pure functions.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", section 4; MMDiT-X, which
gives some blocks a second attention over the image alone: the SD3.5-medium model card.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from functional_sd3.core import computation, layers, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.attention import Implementation, identity_attention
from functional_sd3.core.checks import check_component
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.parallel import sequence
from functional_sd3.parallel.mesh import Mesh
from functional_sd3.parallel.replicated import enter
from functional_sd3.parallel.tensor import check_heads, linear_joined
from functional_sd3.parallel.transport import Group, group_size
from functional_sd3.transformer import embeddings, joint_block
from functional_sd3.transformer.checks import check_latents, check_shape
from functional_sd3.transformer.embeddings import TIME_FREQUENCIES, embed_condition, embedder_spec, position_spec
from functional_sd3.transformer.head import embed_context, modulate_blocks, resolve_modulations
from functional_sd3.transformer.joint_block import Attend

AttendBlocks = Attend | Mapping[int, Attend]
"""The attention of every block, or of those whose index is mapped to one."""


@dataclass(frozen=True)
class Config:
    """Sizes of an MMDiT; `SD3_MEDIUM`, `SD35_MEDIUM` and `SD35_LARGE` are the released ones.

    position_size: side of the table of positions, in patches; sample_size: side of the latents at which neighbouring
    patches are one unit apart. The blocks in dual_attention_layers have a second attention, over the image alone.
    interval_size: inputs of the embedder of t - r (`embeddings.interval_sinusoid`), 0 for none: with it the network is
    a mean velocity over [r, t] (MeanFlow), and for r = t the velocity at t. The embedder starts at zero.
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
    interval_size: int = 0

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


SD3_MEDIUM = Config(depth=24, heads=24)
SD35_MEDIUM = Config(depth=24, heads=24, position_size=384, qk_norm=True, dual_attention_layers=tuple(range(13)))
SD35_LARGE = Config(depth=38, heads=38, qk_norm=True)


def spec(config: Config) -> Tree:
    """Parameter tree, initialised as DiT's (Peebles and Xie 2023): each block starts as the identity."""
    width = config.width
    patch_inputs = config.in_channels * config.patch_size**2
    interval = embedder_spec(config.interval_size, width, "frequencies", zero=True) if config.interval_size else None
    return {
        "position": position_spec(width, config.position_size, config.sample_size // config.patch_size),
        "patch": layers.conv2d_spec(
            config.in_channels,
            width,
            config.patch_size,
            init=specs.xavier_uniform(patch_inputs, width),
            axes=("width", "channels"),
        ),
        "time": embedder_spec(TIME_FREQUENCIES, width, "frequencies"),
        **({"interval": interval} if interval else {}),
        "pooled": embedder_spec(config.pooled_width, width, "pooled"),
        "context": joint_block.linear_spec(config.context_width, width, ("width", "context")),
        "blocks": [
            joint_block.spec(
                width,
                config.head_dim,
                qk_norm=config.qk_norm,
                dual=index in config.dual_attention_layers,
                last=index == config.depth - 1,
            )
            for index in range(config.depth)
        ],
        "final": {
            "modulation": joint_block.zero_linear_spec(width, 2 * width, ("modulation", "width")),
            "out": joint_block.zero_linear_spec(width, config.out_channels * config.patch_size**2, ("patch", "width")),
        },
    }


def init(key: Key, config: Config, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
    """Initial parameters; the velocity of an initial network is zero."""
    return specs.init(key, spec(config), dtype=dtype, device=device)


def with_interval(params: Params, config: Config) -> Params:
    """The parameters, with an embedder of t - r of zeros where the config has one and they have none: the velocity is
    the same. A LoRA that brings one (`distill --method meanflow --lora`) adds to it."""
    if not config.interval_size or "interval" in params:
        return params
    some = params["time"]["in"]["bias"]
    described = spec(config)
    zeros = specs.map_params(
        lambda path, leaf: torch.zeros(leaf.shape, dtype=some.dtype, device=some.device), described["interval"]
    )
    return {name: zeros if name == "interval" else params[name] for name in described}


def apply(
    params: Params,
    config: Config,
    latents: Tensor,
    t: Tensor | None,
    context: Tensor,
    pooled: Tensor | None,
    *,
    skip_layers: Collection[int] = (),
    perturbed_layers: Collection[int] = (),
    perturbation: Callable[..., list[Tensor | None]] = identity_attention,
    residuals: Sequence[Tensor] = (),
    residual_after_last: bool = False,
    image_prompt: Sequence[Tree] = (),
    modulations: Tree | None = None,
    interval: Tensor | None = None,
    time_difference: float | None = None,
    attend: AttendBlocks | None = None,
    materialize: Callable[[Params], Params] | None = None,
    implementation: Implementation = "sdpa",
    block_transform: computation.BlockTransform | None = None,
    mesh: Mesh | None = None,
) -> Tensor:
    """Velocity of the rectified flow at `latents`.

    latents (batch, in_channels, height, width); t () or (batch,) in [0, 1], 1 = noise; context (batch, tokens,
    context_width); pooled (batch, pooled_width). Returns (batch, out_channels, height, width) in the dtype
    of `latents`; the computation has the dtype of the parameters.

    skip_layers: indices of blocks to leave out (skip-layer guidance).
    perturbed_layers: indices of blocks whose attention is replaced by `perturbation`: `attention.identity_attention`
        (perturbed-attention guidance) or `attention.blurred_attention` (smoothed energy guidance).
    residuals: a ControlNet's, each (batch, image tokens, width), spread evenly over the blocks and added to the image
        after each but the last, skipped ones included, as diffusers does. residual_after_last: after the last block
        too, as Stability's reference does.
    image_prompt: the keys and values of an image prompt for each block, from `ip_adapter.apply`.
    modulations: those of `modulations` for this t and pooled, which may then be None.
    interval: t - r () or (batch,) of a model with `interval_size`: the mean velocity over [r, t]; 0 by default.
    time_difference: h, such as 0.01: the embedding E of t then has the derivative (E(t + h) - E(t - h)) / 2h, for
        tangents in t (`embeddings.with_difference`); values are the same.
    attend: replaces `attention.joint_attention` in every block, or in those whose index it maps to a function; as in
        `joint_block.apply`. For instance `attention_variants.windowed`. A perturbed block has its perturbation.
    materialize: applied to the parameters of one block inside the function that `block_transform` gets, and to the
        rest: sharded -> gathered, stored -> computed.
    implementation: as in `attention.attention`.
    block_transform: applied to the function that applies one block (`joint_block.apply`): `transform.remat`, or
        `torch.compile` to compile one block instead of `depth` copies of it. Or one for each index of a block that it
        maps to one: `activations.edit_outputs`, which reads and changes what a block returns.
    mesh: of the processes that compute this together, by its axes tensor (of whose heads and hidden features `params`
        is this process's part, `parallel.tensor.cut`) and sequence (of whose image tokens each takes a part). All
        arguments but the divided parameters are the same on all of them, as are the result and its derivatives.

    Raises ValueError when a shape does not fit the config or the batch, an input is not floating, height or width is
    not a multiple of the patch size, the grid of patches is larger than the table of positions, or heads or tokens do
    not divide over the mesh.
    """
    check_component("mmdit", "transformer", params, "patch", config, "patch_size")
    attending = attend if isinstance(attend, Mapping) else dict.fromkeys(range(config.depth), attend) if attend else {}
    check_latents("latents", latents, config.in_channels, config.patch_size)
    _check_layers(config, skip_layers=skip_layers, perturbed_layers=perturbed_layers, attend=attending)
    # Without a mesh nothing of it is run: a compiler follows these lines.
    group, tensor_group = (None, None) if mesh is None else (mesh.group("sequence"), mesh.group("tensor"))
    check_heads(config.heads, group_size(tensor_group))
    if group is not None:
        params, latents, context, modulations, interval, residuals, image_prompt = (
            enter(value, group) for value in (params, latents, context, modulations, interval, residuals, image_prompt)
        )
        t, pooled = enter(t, group), enter(pooled, group)
    params = computation.materialize_rest(params, materialize)
    batch, dtype = latents.shape[0], params["patch"]["weight"].dtype
    context = embed_context(params, config.context_width, context, batch, dtype)
    conditions = partial(
        _conditions, params, config, tensor_group=tensor_group, interval=interval, time_difference=time_difference
    )
    modulation = resolve_modulations(modulations, conditions, t, pooled, batch)
    if image_prompt and len(image_prompt) != config.depth:
        raise ValueError(f"image_prompt is for {len(image_prompt)} blocks, but the transformer has {config.depth}")
    block_functions = computation.block_functions(joint_block.apply, materialize, block_transform, config.depth)
    height, width = (side // config.patch_size for side in latents.shape[-2:])
    for residual in residuals:
        check_shape("residuals", residual, "(batch, tokens, width)", (batch, height * width, config.width))

    image = sequence.own(embed_image(params, config, latents.to(dtype)), group)
    attention_of = partial(sequence.attention, group, height * width)
    for index, (block, block_modulation) in enumerate(zip(params["blocks"], modulation["blocks"], strict=True)):
        if index not in skip_layers:
            options: dict[str, Any] = {"image_prompt": image_prompt[index]} if image_prompt else {}
            options |= {} if tensor_group is None else {"tensor_group": tensor_group}
            if index in perturbed_layers:
                options["attend"] = partial(perturbation, size=(height, width), implementation=implementation)
            elif index in attending:
                options["attend"] = attending[index]
            if group is not None:
                own_attend = options.get("attend")
                options["attend"] = attention_of(own_attend and joint_block.checked(own_attend), implementation)
            if materialize is not None and not isinstance(block_modulation, Tensor):
                # A third of a block would be copied for nothing.
                block = joint_block.without_modulation(block)
            streams = {"image": image, "context": context}
            streams = block_functions[index](block, config.heads, streams, block_modulation, implementation, **options)
            image, context = streams["image"], streams["context"]
        if residuals and (residual_after_last or index < config.depth - 1):
            residual = residuals[residual_index(index, config.depth, len(residuals))]
            image = image + sequence.own(residual, group).to(dtype)
    shift, scale = joint_block.split_modulation(modulation["final"], config.width)
    patches = layers.linear(params["final"]["out"], layers.modulate(joint_block.norm(image), shift, scale))
    patches = sequence.whole(patches, group, height * width)
    return unpatchify(patches, config, height, width).to(latents.dtype)


def residual_index(block: int, depth: int, count: int) -> int:
    """Index of the residual, of `count`, that is added after a block of `depth` (as in diffusers; Stability's reference
    agrees where `depth` is even)."""
    return int(block / (depth / count))


def embed_image(params: Params, config: Config, latents: Tensor) -> Tensor:
    """Patches of `latents` (batch, in_channels, height, width), projected, plus positions: (batch, tokens, width)."""
    return embeddings.embed_image(params, config.patch_size, latents)


def unpatchify(patches: Tensor, config: Config, height: int, width: int) -> Tensor:
    """(batch, height * width, patch_size**2 * out_channels) -> latents of height x width patches."""
    size = config.patch_size
    return rearrange(patches, "batch (h w) (p q c) -> batch c (h p) (w q)", h=height, w=width, p=size, q=size)


def modulations(
    params: Params,
    config: Config,
    t: Tensor,
    pooled: Tensor,
    interval: Tensor | None = None,
    *,
    materialize: Callable[[Params], Params] | None = None,
    mesh: Mesh | None = None,
) -> Tree:
    """Shifts, scales and gates of every block and of the final layer, from t and pooled, for one step or for many.

    t () or (batch,), or (steps, batch) or (steps, 1) for all the steps of a run; pooled (batch, pooled_width); interval
    like t, as in `apply`. Returns
    {"blocks": [{"image", "context"}, ...], "final"} of tensors ([steps,] batch, n * width); `at` takes one step out.
    A third of the parameters is used only here, so during a run they need not stay on the device. materialize, mesh: as
    of `apply`; it is applied to the layers of each block that make modulations alone.
    """
    check_component("mmdit", "transformer", params, "pooled", config, "patch_size")
    group = None if mesh is None else mesh.group("tensor")
    params = computation.materialize_rest(params, materialize)
    condition = embed_condition(params, config.pooled_width, t, pooled, interval)
    blocks = params["blocks"]
    if materialize is not None:
        blocks = map(materialize, map(joint_block.modulation_layers, blocks))
    return {
        "blocks": modulate_blocks(blocks, condition, group),
        "final": linear_joined(params["final"]["modulation"], condition, group),
    }


def at(modulations: Tree, step: int) -> Tree:
    """Modulations of one step out of those of many: every tensor (steps, batch, ...) -> (batch, ...)."""
    return tree.map(lambda leaf: leaf[step], modulations)


def _conditions(
    params: Params, config: Config, t: Tensor, pooled: Tensor, *, tensor_group: Group, **options: Any
) -> Tree:
    """The conditioning vector of every block, which makes its own modulations of it, and the final modulation."""
    condition = embed_condition(params, config.pooled_width, t, pooled, **options)
    final = linear_joined(params["final"]["modulation"], condition, tensor_group)
    return {"blocks": [condition] * config.depth, "final": final}


def _check_layers(config: Config, **layers: Collection[int]) -> None:
    for name, indices in layers.items():
        absent = sorted(index for index in indices if not 0 <= index < config.depth)
        if absent:
            raise ValueError(f"{name} {absent} are not among the blocks 0 to {config.depth - 1}")
