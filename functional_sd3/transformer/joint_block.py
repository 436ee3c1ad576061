"""The block of an MMDiT: two streams, image and context, with weights of their own and one attention over both.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", figure 2b; MMDiT-X, which
gives some blocks a second attention over the image alone: the SD3.5-medium model card.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import cpu, derivatives, layers, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.attention import Implementation, Stream, attention, joint_attention, merge_heads, split_heads
from functional_sd3.core.types import Params, Tree
from functional_sd3.core.watching import by_autograd, unwatched

MLP_RATIO = 4
EPS = 1e-6


def spec(width: int, head_dim: int, *, qk_norm: bool, dual: bool, last: bool) -> Tree:
    """Parameters of one block. `dual`: the image attends a second time; `last`: the context only answers."""
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
    """Parameters of a block that knows no context: the plain DiT block of SD3.5's ControlNets, without head norms."""
    return {
        "image": {
            "modulation": zero_linear_spec(width, 6 * width),
            "attention": _attention_spec(width, head_dim, qk_norm=False),
            "mlp": _mlp_spec(width),
        }
    }


def packed(params: Params, image_rows: int, context_rows: int) -> Params:
    """One block whose weights are also packed, for so many tokens of each stream in a batch (`cpu.packed`)."""
    return {name: _packed(params[name], rows) for name, rows in (("image", image_rows), ("context", context_rows))}


def _packed(stream: Params, rows: int) -> Params:
    # The modulation has rows of its own, the hidden layer is better computed with its activation inside, and where
    # nothing comes out only a part of the projection is used.
    parts = {name: stream[name] for name in ("attention", "attention2", "mlp") if "out" in stream.get(name, {})}
    chosen = {
        part: {name: cpu.packed(layer, rows) if name in ("qkv", "out") else layer for name, layer in params.items()}
        for part, params in parts.items()
    }
    return {**stream, **chosen}


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
    """One joint block: image and context (batch, tokens, width) -> the same.

    `modulation` holds what t and the pooled text say to each stream, (batch, n * width): shift, scale and gate of the
    attention, then of the MLP, then of the second attention where there is one. In the last block the context has scale
    and shift alone: it is attended to, asks nothing and is returned as it came. `image_prompt`: what the image attends
    to besides, one of `ip_adapter.apply`'s. `attend`: what stands for `joint_attention`, the image being the first
    stream.
    """
    width = image.shape[-1]
    image_parts = split_modulation(modulation["image"], width)
    context_parts = split_modulation(modulation["context"], width)
    streams = image, context, image_parts, context_parts
    image, context = _attend(params, heads, *streams, implementation, image_prompt or {}, attend or joint_attention)
    image = _mlp(params["image"]["mlp"], image, *image_parts[3:6])
    if "mlp" not in params["context"]:
        return image, context
    return image, _mlp(params["context"]["mlp"], context, *context_parts[3:])


def apply_image(
    params: Params, heads: int, image: Tensor, modulation: dict[str, Tensor], implementation: Implementation = "sdpa"
) -> Tensor:
    """One block of the image alone (Peebles and Xie 2023, DiT): image (batch, tokens, width) -> the same."""
    parts = split_modulation(modulation["image"], image.shape[-1])
    own, (shift, scale, gate) = params["image"]["attention"], parts[:3]
    projected = _project(own, heads, modulate(norm(image), shift, scale))
    (attended,) = joint_attention([_stream(own, projected)], implementation=implementation)
    image = _add_attended(own, image, gate, attended)
    return _mlp(params["image"]["mlp"], image, *parts[3:])


def _attend(params, heads, image, context, image_parts, context_parts, implementation, image_prompt, attend):
    own, other = params["image"]["attention"], params["context"]["attention"]
    shift, scale, gate = image_parts[:3]
    last = "out" not in other
    # The last block's two parts are the other way round: its modulation is kept as diffusers stores it.
    context_shift, context_scale = reversed(context_parts) if last else context_parts[:2]
    normed = norm(image)
    attended, context_attended = _attend_both(
        own,
        other,
        heads,
        modulate(normed, shift, scale),
        modulate(norm(context), context_shift, context_scale),
        implementation,
        image_prompt,
        attend,
    )
    image = _add_attended(own, image, gate, attended)
    if not last:
        context = _add_attended(other, context, context_parts[2], context_attended)
    if "attention2" in params["image"]:
        again, (shift, scale, gate) = params["image"]["attention2"], image_parts[6:]
        projected = _project(again, heads, modulate(normed, shift, scale))
        (attended,) = attend([_stream(again, projected)], implementation=implementation)
        if "attention2" in image_prompt:
            attended = attended + _attend_prompt(projected, image_prompt["attention2"], implementation)
        image = _add_attended(again, image, gate, attended)
    return image, context


def _attend_both(own, other, heads, image, context, implementation, image_prompt, attend) -> Sequence[Tensor | None]:
    """What both streams, modulated, learn of each other and themselves; None for a context that asks nothing."""
    asks, norms = "out" in other, _head_norms(own, other)
    if attend is not joint_attention or "attention" in image_prompt or not _joins(own, other, norms, image, context):
        projected, told = _project(own, heads, image), _project(other, heads, context, asks=asks)
        del image, context  # here and below: what is held through the attention is the most that a block needs
        attended, answer = attend([_stream(own, projected), _stream(other, told)], implementation=implementation)
        if "attention" in image_prompt:
            attended = attended + _attend_prompt(projected, image_prompt["attention"], implementation)
        return attended, answer
    width, tokens = image.shape[-1], [image.shape[1], context.shape[1]]
    told = other["qkv"] if asks else layers.split_outputs(other["qkv"], (width, 2 * width))[1]
    projected = layers.linear(own["qkv"], image), layers.linear(told, context)
    norms = norms if asks else norms[:2] + norms[3:]
    given = projected, norms, heads, width, EPS
    if unwatched(*projected, *norms):
        joined, _ = derivatives.joined(*given)
    elif by_autograd(*projected, *norms):
        joined = derivatives.joined_heads(*given)
    else:  # the layers are watched in another way, mapped for one
        joined = derivatives.joined_heads_formula(*given)
    del image, context, projected, given
    attended = attention(*joined, implementation=implementation)
    return attended.split(tokens, dim=2) if asks else (attended, None)


def _head_norms(*attentions: Params) -> list[Tensor]:
    """The weights of the norms of queries and keys, attention by attention."""
    names = "query_norm", "key_norm"
    return [params[name]["weight"] for params in attentions for name in names if name in params]


def _joins(own: Params, other: Params, norms: Sequence[Tensor], image: Tensor, context: Tensor) -> bool:
    """Whether both streams may be normed into one tensor: on a CPU, where eager autograd watches every part, or nothing
    watches them (the layers apart); with all norms or none."""
    if len(norms) not in (0, 4) or len(image) != len(context):
        return False
    if by_autograd(image, context, *norms, own["qkv"]["weight"], other["qkv"]["weight"]):
        return True
    leaves = [leaf for params in (own, other) for leaf in tree.leaves(params["qkv"])]
    learned = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
    return unwatched(image, context, *norms) and not learned


def _attend_prompt(projected: Stream, prompt: Tree, implementation: Implementation) -> Tensor:
    """What an image prompt adds to the image's attention: of the image over itself and the prompt's tokens."""
    # An adapter's parameters may be of another dtype than the transformer's.
    dtype = projected.value.dtype
    key = layers.rms_norm(prompt["key_norm"], projected.key, EPS).to(dtype)
    key = torch.cat([key, prompt["key"].to(dtype)], dim=2)
    value = torch.cat([projected.value, prompt["value"].to(dtype)], dim=2)
    query = layers.rms_norm(prompt["query_norm"], projected.query, EPS).to(dtype)
    return (prompt["scale"] * attention(query, key, value, implementation=implementation)).to(dtype)


def split_modulation(modulation: Tensor, width: int) -> Sequence[Tensor]:
    """(batch, n * width) -> n tensors (batch, 1, width)."""
    return modulation.unsqueeze(-2).split(width, dim=-1)


def norm(x: Tensor) -> Tensor:
    """Layer norm over the last axis; its scale and shift are the modulation's."""
    return layers.layer_norm({}, x, EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return layers.add_product(shift, x, 1 + scale)


def linear_spec(inputs: int, outputs: int) -> Tree:
    """A linear layer initialised as DiT's are (Peebles and Xie 2023): Xavier uniform, no bias yet."""
    return layers.linear_spec(inputs, outputs, init=specs.xavier_uniform(inputs, outputs))


def zero_linear_spec(inputs: int, outputs: int) -> Tree:
    """A linear layer that starts at zero, so that what it modulates starts as the identity."""
    return layers.linear_spec(inputs, outputs, init=specs.zeros)


def _project(params: Params, heads: int, x: Tensor, *, asks: bool = True) -> Stream:
    """Queries, keys and values (batch, heads, tokens, head_dim) of x (batch, tokens, width), not yet normed."""
    width = x.shape[-1]
    if not asks:
        _, told = layers.split_outputs(params["qkv"], (width, 2 * width))
        return Stream(None, *_split_heads(layers.linear(told, x), 2, heads))
    if x.requires_grad and not by_autograd(x, params["qkv"]["weight"]):
        # A backward pass needs queries and keys again, for their norms, but not the values, which would stay in memory
        # as a part of the same tensor. By hand it keeps less else, and one product is faster than two.
        normed, value = layers.split_outputs(params["qkv"], (2 * width, width))
        return Stream(*_split_heads(layers.linear(normed, x), 2, heads), split_heads(layers.linear(value, x), heads))
    return Stream(*_split_heads(layers.linear(params["qkv"], x), 3, heads))


def _stream(params: Params, projected: Stream) -> Stream:
    """What is projected, with the norms of the heads where the block has them."""
    query, key, value = projected
    query = None if query is None else _head_norm(params, "query_norm", query)
    return Stream(query, _head_norm(params, "key_norm", key), value)


def _split_heads(x: Tensor, parts: int, heads: int) -> Sequence[Tensor]:
    # One after the other, not as an axis of parts: backwards that would be two copies instead of one.
    return [split_heads(part, heads) for part in x.chunk(parts, dim=-1)]


def _head_norm(params: Params, name: str, x: Tensor) -> Tensor:
    return layers.rms_norm(params[name], x, EPS) if name in params else x


def _add_attended(params: Params, x: Tensor, gate: Tensor, attended: Tensor) -> Tensor:
    return layers.add_product(x, gate, layers.linear(params["out"], merge_heads(attended)))


def _mlp(params: Params, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    return layers.add_product(x, gate, layers.mlp(params, modulate(norm(x), shift, scale), "gelu_tanh"))


def _attention_spec(width: int, head_dim: int, qk_norm: bool, *, out: bool = True) -> Tree:
    # Three square matrices that are only stored as one.
    tree: dict[str, Any] = {"qkv": layers.linear_spec(width, 3 * width, init=specs.xavier_uniform(width, width))}
    if qk_norm:
        tree["query_norm"] = layers.norm_spec(head_dim, bias=False)
        tree["key_norm"] = layers.norm_spec(head_dim, bias=False)
    if out:
        tree["out"] = linear_spec(width, width)
    return tree


def _mlp_spec(width: int) -> Tree:
    return {"in": linear_spec(width, MLP_RATIO * width), "out": linear_spec(MLP_RATIO * width, width)}
