"""Block of the MMDiT: streams of tokens with separate weights and one joint attention.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", figure 2b, has two
streams, image and context; MMDiT-X gives some blocks a second attention over the image alone: the SD3.5-medium model
card. With one stream it is the block of a DiT (Peebles and Xie 2023), and it takes any number:

    registers = spec.init(key, joint_block.stream_spec(width, head_dim, qk_norm=True))
    params = {**params["blocks"][0], "registers": registers}
    streams = joint_block.apply(params, heads, {"image": x, "context": c, "registers": r}, condition)
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core import spec as specs
from functional_sd3.core.attention import (
    Implementation,
    Stream,
    joint_attention,
    merge_heads,
    queries,
    split_heads,
)
from functional_sd3.core.checks import function_name
from functional_sd3.core.types import Params, Tree
from functional_sd3.parallel import tensor
from functional_sd3.parallel.sequence import Attend, SequenceAttention
from functional_sd3.parallel.transport import Group, group_size

AttendPrompt = Callable[[Stream], Tensor]
MLP_RATIO = 4
EPS = 1e-6


def spec(width: int, head_dim: int, *, qk_norm: bool, dual: bool, last: bool) -> Tree:
    """Parameters of one block. dual: a second attention, over the image; last: the context has keys and values only."""
    return {
        "image": stream_spec(width, head_dim, qk_norm=qk_norm, dual=dual),
        "context": stream_spec(width, head_dim, qk_norm=qk_norm, queries=not last),
    }


def stream_spec(width: int, head_dim: int, *, qk_norm: bool, dual: bool = False, queries: bool = True) -> Tree:
    """Parameters of one stream of a block. dual: a second attention, over this stream alone; queries: False for a
    stream that is attended to and stays as it is."""
    count = (9 if dual else 6) if queries else 2
    tree: dict[str, Any] = {
        "modulation": zero_linear_spec(width, count * width, ("modulation", "width")),
        "attention": _attention_spec(width, head_dim, qk_norm, out=queries),
    }
    if dual:
        tree["attention2"] = _attention_spec(width, head_dim, qk_norm)
    if queries:
        tree["mlp"] = _mlp_spec(width)
    return tree


def apply(
    params: Params,
    heads: int,
    streams: Mapping[str, Tensor],
    modulation: Mapping[str, Tensor] | Tensor,
    implementation: Implementation = "sdpa",
    image_prompt: Tree | None = None,
    attend: Attend | None = None,
    tensor_group: Group = None,
) -> dict[str, Tensor]:
    """One joint block: streams {name: (batch, tokens, width)} -> tensors of the same names and shapes.

    params: {name: `stream_spec`}; all queries attend to the keys of all streams, in the order of `streams`. modulation:
    the conditioning vector (batch, width), of which each stream's layer "modulation" makes its own, or what it makes,
    {name: (batch, n * width)}: shift, scale and gate of the attention, then of the MLP, then of the second attention
    where there is one. A stream without queries has shift and scale only and is returned unchanged: the context of the
    last block. image_prompt: keys and values of an image prompt, one of `ip_adapter.apply`'s, for the first stream.
    attend: replaces `joint_attention`: a list of `attention.Stream` -> a list of (batch, heads, tokens, head_dim), None
    for a stream without queries; for a second attention it is called with one stream. Raises ValueError where it
    returns another number of tensors, or one of another shape, dtype or device.
    tensor_group: processes of which each has part of the heads and hidden features in `params` (`parallel.tensor.cut`);
    `heads` is the number of all, and attend has this process's streams of them.
    """
    if isinstance(modulation, Tensor):
        modulation = modulate({name: params[name] for name in streams}, modulation, tensor_group)
    parts = {name: split_modulation(modulation[name], x.shape[-1]) for name, x in streams.items()}
    joint = partial(joint_attention, implementation=implementation)
    attending = checked(attend) if attend else joint
    # Keys of an image that is divided are elsewhere too.
    attending_prompt = attend.without_attend() if isinstance(attend, SequenceAttention) else joint
    prompts = {
        name: partial(_attend_prompt, prompt, attend=attending_prompt, group=tensor_group)
        for name, prompt in (image_prompt or {}).items()
    }
    normed = {name: norm(x) for name, x in streams.items() if "attention2" in params[name]}
    streams = _add_joint_attention(
        params, heads, streams, normed, parts, attending, prompts.get("attention"), tensor_group
    )
    for index, name in enumerate(streams):
        if name in normed:
            shift, scale, gate = parts[name][6:]
            prompt = prompts.get("attention2") if index == 0 else None
            modulated = layers.modulate(normed.pop(name), shift, scale)
            attended = _attend_alone(params[name]["attention2"], heads, modulated, attending, prompt, tensor_group)
            streams[name] = layers.add_gated(streams[name], gate, attended)
            del modulated, attended
        if "mlp" in params[name]:
            streams[name] = _add_mlp(params[name]["mlp"], streams[name], parts[name][3:6], tensor_group)
    return streams


# Intermediate results are freed when these functions return, which bounds the memory of a block.


def _add_joint_attention(
    params: Params,
    heads: int,
    streams: Mapping[str, Tensor],
    normed: Mapping[str, Tensor],
    parts: Mapping[str, Sequence[Tensor]],
    attend: Attend,
    attend_prompt: AttendPrompt | None,
    group: Group,
) -> dict[str, Tensor]:
    """All streams plus their gated joint attention; `normed`: layer norms of streams that are there already."""
    projected: list[Stream] = []
    prompt_attended = None
    for name, x in streams.items():
        shift, scale = parts[name][:2]
        modulated = layers.modulate(normed[name] if name in normed else norm(x), shift, scale)
        stream = _project(params[name]["attention"], heads, modulated, group)
        if attend_prompt and not projected:
            prompt_attended = attend_prompt(stream)
        projected.append(_norm_heads(params[name]["attention"], stream, group))
        del modulated, stream
    attended = attend(projected)
    del projected  # not needed for the products below
    added: dict[str, Tensor] = {}
    for (name, x), own in zip(streams.items(), attended, strict=True):
        if "out" not in params[name]["attention"]:
            added[name] = x
            continue
        output = _project_out(params[name]["attention"], own, None if added else prompt_attended, group)
        added[name] = layers.add_gated(x, parts[name][2], output)
    return added


def checked(attend: Attend) -> Attend:
    """attend, of whose results each stream with queries must have a tensor like its values; else ValueError."""
    return attend if isinstance(attend, SequenceAttention) else partial(_checked, attend)


def _checked(attend: Attend, streams: list[Stream]) -> list[Tensor | None]:
    attended: Any = attend(streams)
    count, name = len(streams), function_name(attend)
    if not isinstance(attended, list | tuple) or len(attended) != count:
        what = f"{len(attended)} results" if isinstance(attended, list | tuple) else type(attended).__name__
        raise ValueError(
            f"attend {name} returned {what}; it must return a list of {count}: for each stream a tensor, or None "
            "for one without queries"
        )
    for index, (stream, own) in enumerate(zip(streams, attended, strict=True)):
        if stream.query is None:
            continue
        shape, value = stream.query.shape[:-1] + stream.value.shape[-1:], stream.value
        # Autocast chooses dtypes itself.
        dtypes = (value.dtype, own.dtype) if torch.is_autocast_enabled(value.device.type) else (value.dtype,)
        if not isinstance(own, Tensor) or own.shape != shape or own.dtype not in dtypes or own.device != value.device:
            what = f"{own.dtype} {list(own.shape)} on {own.device}" if isinstance(own, Tensor) else type(own).__name__
            raise ValueError(
                f"attend {name} returned {what} for stream {index}, which has queries; it must return {value.dtype} "
                f"{list(shape)} (batch, heads, tokens, head_dim) on {value.device}"
            )
    return list(attended)


def _attend_alone(
    params: Params, heads: int, x: Tensor, attend: Attend, attend_prompt: AttendPrompt | None, group: Group
) -> Tensor:
    """Self-attention of one stream: x (batch, tokens, width), modulated -> the same shape."""
    stream = _project(params, heads, x, group)
    prompt_attended = attend_prompt(stream) if attend_prompt else None
    (attended,) = attend([_norm_heads(params, stream, group)])
    del stream
    return _project_out(params, attended, prompt_attended, group)


def _attend_prompt(prompt: Tree, stream: Stream, *, attend: Attend, group: Group) -> Tensor:
    """Scaled attention of the image's queries to the image's keys and those of the image prompt."""
    # An adapter's parameters may be of another dtype than the transformer's.
    dtype = stream.value.dtype
    query_norm, key_norm = (tensor.enter(prompt[name], group) for name in ("query_norm", "key_norm"))
    query = layers.rms_norm(query_norm, queries(stream), EPS).to(dtype)
    key = layers.rms_norm(key_norm, stream.key, EPS).to(dtype)
    shown = Stream(None, *(tensor.own_heads(prompt[name].to(dtype), group) for name in ("key", "value")))
    attended, _ = attend([Stream(query, key, stream.value), shown])
    assert attended is not None
    return (prompt["scale"] * attended).to(dtype)


def modulate(block: Params, condition: Tensor, tensor_group: Group = None) -> dict[str, Tensor]:
    """Modulations {stream: ([steps,] batch, n * width)} of a block, from the conditioning vector."""
    return {name: tensor.linear_joined(stream["modulation"], condition, tensor_group) for name, stream in block.items()}


def modulation_layers(block: Params) -> Params:
    """The part of a block that `modulate` reads."""
    return {name: {"modulation": stream["modulation"]} for name, stream in block.items()}


def without_modulation(block: Params) -> Params:
    """The part of a block that `apply` reads where it is given modulations."""
    return {
        name: {layer: leaf for layer, leaf in stream.items() if layer != "modulation"} for name, stream in block.items()
    }


def split_modulation(modulation: Tensor, width: int) -> Sequence[Tensor]:
    """(batch, n * width) -> n tensors (batch, 1, width)."""
    return modulation.unsqueeze(-2).split(width, dim=-1)


def norm(x: Tensor) -> Tensor:
    """Layer norm (eps 1e-6) of x (..., width) without scale and shift, which are the modulation's."""
    return layers.layer_norm({}, x, EPS)


def linear_spec(inputs: int, outputs: int, axes: tuple[str, str]) -> Tree:
    """A linear layer initialised as DiT's are (Peebles and Xie 2023): Xavier uniform, no bias yet."""
    return layers.linear_spec(inputs, outputs, init=specs.xavier_uniform(inputs, outputs), axes=axes)


def zero_linear_spec(inputs: int, outputs: int, axes: tuple[str, str]) -> Tree:
    """A linear layer that starts at zero, so that the branch it modulates starts as the identity."""
    return layers.linear_spec(inputs, outputs, init=specs.zeros, axes=axes)


def _project(params: Params, heads: int, x: Tensor, group: Group) -> Stream:
    """Queries, keys and values (batch, own heads, tokens, head_dim) of x (batch, tokens, width), before their norms; no
    queries for a stream without output layer."""
    qkv, inner = tensor.columns(params["qkv"], group), params["qkv"]["weight"].shape[0] // 3
    heads, x = heads // group_size(group), tensor.enter(x, group)
    if "out" in params:
        return Stream(*_split_heads(layers.linear(qkv, x), 3, heads))
    _, key_value = layers.split_outputs(qkv, (inner, 2 * inner))
    return Stream(None, *_split_heads(layers.linear(key_value, x), 2, heads))


def _norm_heads(params: Params, stream: Stream, group: Group) -> Stream:
    """The stream with RMS norms of its queries and keys, head by head, where the block has these norms."""
    if "key_norm" not in params:
        return stream
    query = None
    if stream.query is not None:
        query = layers.rms_norm(tensor.enter(params["query_norm"], group), stream.query, EPS)
    return stream._replace(query=query, key=layers.rms_norm(tensor.enter(params["key_norm"], group), stream.key, EPS))


def _project_out(params: Params, attended: Tensor | None, prompt_attended: Tensor | None, group: Group) -> Tensor:
    """Output layer of an attention on its merged heads, with those of an image prompt added: (batch, tokens, width)."""
    assert attended is not None
    merged = merge_heads(attended if prompt_attended is None else attended + prompt_attended)
    return tensor.linear_rows(params["out"], merged, group)


def _split_heads(x: Tensor, parts: int, heads: int) -> Sequence[Tensor]:
    # Chunks rather than an axis of parts, whose backward pass makes two copies instead of one.
    return [split_heads(part, heads) for part in x.chunk(parts, dim=-1)]


def _add_mlp(params: Params, x: Tensor, modulation: Sequence[Tensor], group: Group) -> Tensor:
    """x + gate * MLP(modulate(norm(x)))."""
    shift, scale, gate = modulation
    branch = tensor.mlp(params, layers.modulate(norm(x), shift, scale), "gelu_tanh", group)
    return layers.add_gated(x, gate, branch)


def _attention_spec(width: int, head_dim: int, qk_norm: bool, *, out: bool = True) -> Tree:
    # Initialised as the three square matrices that are stored as one.
    uniform = specs.xavier_uniform(width, width)
    tree: dict[str, Any] = {"qkv": layers.linear_spec(width, 3 * width, init=uniform, axes=("qkv", "width"))}
    if qk_norm:
        tree["query_norm"] = layers.norm_spec(head_dim, bias=False, axis="head_dim")
        tree["key_norm"] = layers.norm_spec(head_dim, bias=False, axis="head_dim")
    if out:
        tree["out"] = linear_spec(width, width, ("width", "heads"))
    return tree


def _mlp_spec(width: int) -> Tree:
    hidden = MLP_RATIO * width
    return {
        "in": linear_spec(width, hidden, ("hidden", "width")),
        "out": linear_spec(hidden, width, ("width", "hidden")),
    }
