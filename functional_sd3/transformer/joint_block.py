"""Block of the MMDiT: two streams, image and context, with separate weights and one joint attention.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", figure 2b; MMDiT-X, which
gives some blocks a second attention over the image alone: the SD3.5-medium model card.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core import spec as specs
from functional_sd3.core.attention import (
    Implementation,
    Stream,
    attention,
    joint_attention,
    merge_heads,
    queries,
    split_heads,
)
from functional_sd3.core.types import Params, Tree

Attend = Callable[[list[Stream]], list[Tensor | None]]
AttendPrompt = Callable[[Stream], Tensor]
MLP_RATIO = 4
EPS = 1e-6


def spec(width: int, head_dim: int, *, qk_norm: bool, dual: bool, last: bool) -> Tree:
    """Parameters of one block. dual: a second attention, over the image; last: the context has keys and values only."""
    image: dict[str, Any] = {
        "modulation": zero_linear_spec(width, (9 if dual else 6) * width),
        "attention": _attention_spec(width, head_dim, qk_norm),
    }
    if dual:
        image["attention2"] = _attention_spec(width, head_dim, qk_norm)
    image["mlp"] = _mlp_spec(width)
    context = {
        "modulation": zero_linear_spec(width, (2 if last else 6) * width),
        "attention": _attention_spec(width, head_dim, qk_norm, out=not last),
    }
    if not last:
        context["mlp"] = _mlp_spec(width)
    return {"image": image, "context": context}


def image_spec(width: int, head_dim: int) -> Tree:
    """Parameters of a block without context: the plain DiT block of SD3.5's ControlNets, without norms of heads."""
    return {
        "image": {
            "modulation": zero_linear_spec(width, 6 * width),
            "attention": _attention_spec(width, head_dim, qk_norm=False),
            "mlp": _mlp_spec(width),
        }
    }


def apply(
    params: Params,
    heads: int,
    image: Tensor,
    context: Tensor,
    modulation: dict[str, Tensor],
    implementation: Implementation = "sdpa",
    image_prompt: Tree | None = None,
    attend: Callable[..., list[Tensor | None]] | None = None,
) -> tuple[Tensor, Tensor]:
    """One joint block: image and context (batch, tokens, width) -> tensors of the same shapes.

    modulation: {stream: (batch, n * width)}: shift, scale and gate of the attention, then of the MLP, then of the
    second attention where there is one. In the last block the context has scale and shift only: it has no queries and
    is returned unchanged. image_prompt: keys and values of an image prompt, one of `ip_adapter.apply`'s. attend:
    replaces `joint_attention`; the image is the first stream.
    """
    width = image.shape[-1]
    image_parts = split_modulation(modulation["image"], width)
    context_parts = split_modulation(modulation["context"], width)
    attend = partial(attend or joint_attention, implementation=implementation)
    prompts = {
        name: partial(_attend_prompt, prompt, implementation=implementation)
        for name, prompt in (image_prompt or {}).items()
    }
    normed = norm(image)
    image, context = _add_joint_attention(
        params, heads, image, normed, context, image_parts, context_parts, attend, prompts.get("attention")
    )
    if "attention2" in params["image"]:
        shift, scale, gate = image_parts[6:]
        modulated = modulate(normed, shift, scale)
        attended = _attend_image(params["image"]["attention2"], heads, modulated, attend, prompts.get("attention2"))
        image = torch.addcmul(image, gate, attended)
    image = _add_mlp(params["image"]["mlp"], image, *image_parts[3:6])
    if "mlp" not in params["context"]:
        return image, context
    return image, _add_mlp(params["context"]["mlp"], context, *context_parts[3:])


def apply_image(
    params: Params, heads: int, image: Tensor, modulation: dict[str, Tensor], implementation: Implementation = "sdpa"
) -> Tensor:
    """One DiT block, without context (Peebles and Xie 2023): image (batch, tokens, width) -> the same shape."""
    parts = split_modulation(modulation["image"], image.shape[-1])
    attend = partial(joint_attention, implementation=implementation)
    shift, scale, gate = parts[:3]
    modulated = modulate(norm(image), shift, scale)
    image = torch.addcmul(image, gate, _attend_image(params["image"]["attention"], heads, modulated, attend))
    return _add_mlp(params["image"]["mlp"], image, *parts[3:])


# Intermediate results are freed when these functions return, which bounds the memory of a block.


def _add_joint_attention(
    params: Params,
    heads: int,
    image: Tensor,
    normed: Tensor,
    context: Tensor,
    image_parts: Sequence[Tensor],
    context_parts: Sequence[Tensor],
    attend: Attend,
    attend_prompt: AttendPrompt | None,
) -> tuple[Tensor, Tensor]:
    """Both streams plus their gated joint attention; `normed`: the layer norm of the image."""
    image_params, context_params = params["image"]["attention"], params["context"]["attention"]
    shift, scale, gate = image_parts[:3]
    last = "out" not in context_params
    context_shift, context_scale = context_parts[:2]
    image_stream = _project(image_params, heads, modulate(normed, shift, scale))
    prompt_attended = attend_prompt(image_stream) if attend_prompt else None
    image_stream = _norm_heads(image_params, image_stream)
    context_stream = _project(context_params, heads, modulate(norm(context), context_shift, context_scale))
    image_attended, context_attended = attend([image_stream, _norm_heads(context_params, context_stream)])
    del image_stream, context_stream  # not needed for the products below
    image = torch.addcmul(image, gate, _project_out(image_params, image_attended, prompt_attended))
    if last:
        return image, context
    return image, torch.addcmul(context, context_parts[2], _project_out(context_params, context_attended))


def _attend_image(
    params: Params, heads: int, x: Tensor, attend: Attend, attend_prompt: AttendPrompt | None = None
) -> Tensor:
    """Self-attention of the image: x (batch, tokens, width), modulated -> the same shape."""
    stream = _project(params, heads, x)
    prompt_attended = attend_prompt(stream) if attend_prompt else None
    (attended,) = attend([_norm_heads(params, stream)])
    del stream
    return _project_out(params, attended, prompt_attended)


def _attend_prompt(prompt: Tree, stream: Stream, *, implementation: Implementation) -> Tensor:
    """Scaled attention of the image's queries to the image's keys and those of the image prompt."""
    # An adapter's parameters may be of another dtype than the transformer's.
    dtype = stream.value.dtype
    key = layers.rms_norm(prompt["key_norm"], stream.key, EPS).to(dtype)
    key = torch.cat([key, prompt["key"].to(dtype)], dim=2)
    value = torch.cat([stream.value, prompt["value"].to(dtype)], dim=2)
    query = layers.rms_norm(prompt["query_norm"], queries(stream), EPS).to(dtype)
    return (prompt["scale"] * attention(query, key, value, implementation=implementation)).to(dtype)


def split_modulation(modulation: Tensor, width: int) -> Sequence[Tensor]:
    """(batch, n * width) -> n tensors (batch, 1, width)."""
    return modulation.unsqueeze(-2).split(width, dim=-1)


def norm(x: Tensor) -> Tensor:
    """Layer norm over the last axis without scale and shift, which are the modulation's."""
    return layers.layer_norm({}, x, EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


def linear_spec(inputs: int, outputs: int) -> Tree:
    """A linear layer initialised as DiT's are (Peebles and Xie 2023): Xavier uniform, no bias yet."""
    return layers.linear_spec(inputs, outputs, init=specs.xavier_uniform(inputs, outputs))


def zero_linear_spec(inputs: int, outputs: int) -> Tree:
    """A linear layer that starts at zero, so that the branch it modulates starts as the identity."""
    return layers.linear_spec(inputs, outputs, init=specs.zeros)


def _project(params: Params, heads: int, x: Tensor) -> Stream:
    """Queries, keys and values (batch, heads, tokens, head_dim) of x (batch, tokens, width), before their norms; no
    queries for a stream without output layer."""
    if "out" in params:
        return Stream(*_split_heads(layers.linear(params["qkv"], x), 3, heads))
    width = x.shape[-1]
    _, key_value = layers.split_outputs(params["qkv"], (width, 2 * width))
    return Stream(None, *_split_heads(layers.linear(key_value, x), 2, heads))


def _norm_heads(params: Params, stream: Stream) -> Stream:
    """The stream with RMS norms of its queries and keys, head by head, where the block has these norms."""
    if "key_norm" not in params:
        return stream
    query = None if stream.query is None else layers.rms_norm(params["query_norm"], stream.query, EPS)
    return stream._replace(query=query, key=layers.rms_norm(params["key_norm"], stream.key, EPS))


def _project_out(params: Params, attended: Tensor | None, prompt_attended: Tensor | None = None) -> Tensor:
    """Output layer of an attention on its merged heads, with those of an image prompt added: (batch, tokens, width)."""
    if attended is None:
        raise ValueError("attend returned None for a stream with queries")
    return layers.linear(
        params["out"], merge_heads(attended if prompt_attended is None else attended + prompt_attended)
    )


def _split_heads(x: Tensor, parts: int, heads: int) -> Sequence[Tensor]:
    # Chunks rather than an axis of parts, whose backward pass makes two copies instead of one.
    return [split_heads(part, heads) for part in x.chunk(parts, dim=-1)]


def _add_mlp(params: Params, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    """x + gate * MLP(modulate(norm(x)))."""
    return torch.addcmul(x, gate, layers.mlp(params, modulate(norm(x), shift, scale), "gelu_tanh"))


def _attention_spec(width: int, head_dim: int, qk_norm: bool, *, out: bool = True) -> Tree:
    # Initialised as the three square matrices that are stored as one.
    tree: dict[str, Any] = {"qkv": layers.linear_spec(width, 3 * width, init=specs.xavier_uniform(width, width))}
    if qk_norm:
        tree["query_norm"] = layers.norm_spec(head_dim, bias=False)
        tree["key_norm"] = layers.norm_spec(head_dim, bias=False)
    if out:
        tree["out"] = linear_spec(width, width)
    return tree


def _mlp_spec(width: int) -> Tree:
    return {"in": linear_spec(width, MLP_RATIO * width), "out": linear_spec(MLP_RATIO * width, width)}
