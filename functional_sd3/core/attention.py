"""Scaled dot product attention, and joint attention over any number of token streams.

Esser et al. 2024, "Scaling Rectified Flow Transformers", section 4: each stream has weights of its own, one softmax
runs over the tokens of all of them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from functional_sd3.core.dispatch import in_forward_mode

Implementation = Literal["sdpa", "math"]


class Stream(NamedTuple):
    """Queries, keys and values of one stream of tokens, each (batch, heads, tokens, head_dim).

    query is None for a stream that is attended to and has no output of its own (SD3's context in the last block).
    """

    query: Tensor | None
    key: Tensor
    value: Tensor

    @property
    def has_queries(self) -> bool:
        return self.query is not None


def queries(stream: Stream) -> Tensor:
    """The queries of a stream. Raises ValueError for a stream without."""
    if stream.query is None:
        raise ValueError("this stream needs queries: only streams that are attended to may have query=None")
    return stream.query


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: Implementation = "sdpa",
) -> Tensor:
    """softmax(query key^T * scale + mask) value.

    query (batch, heads, tokens, head_dim), key and value (batch, heads, others, head_dim); `mask` is boolean (True =
    attend) or additive, broadcastable to (batch, heads, tokens, others); `scale` defaults to head_dim ** -0.5.
    "sdpa" is PyTorch's fused kernel; "math" has forward-mode derivatives and batching rules for every transform.
    Raises NotImplementedError for forward-mode derivatives of "sdpa".
    """
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} must be one of {sorted(_IMPLEMENTATIONS)}")
    if causal and mask is not None:
        raise ValueError("attention takes a mask or causal=True, not both; add the causal part to the mask")
    return _IMPLEMENTATIONS[implementation](query, key, value, mask, causal, scale)


def joint_attention(
    streams: Sequence[Stream],
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    implementation: Implementation = "sdpa",
) -> list[Tensor | None]:
    """Attention in which the queries of every stream attend to the keys and values of all streams.

    Returns one tensor (batch, heads, tokens, head_dim) a stream, None where the stream has no queries. `mask` is over
    the concatenated tokens: (..., tokens with queries, all tokens). Raises ValueError when no stream has queries.
    """
    with_queries = [stream.query for stream in streams if stream.query is not None]
    if not with_queries:
        raise ValueError("joint_attention needs at least one stream with queries")
    key = torch.cat([stream.key for stream in streams], dim=2)
    value = torch.cat([stream.value for stream in streams], dim=2)
    query = torch.cat(with_queries, dim=2)
    attended = attention(query, key, value, mask=mask, scale=scale, implementation=implementation)
    parts = iter(attended.split([query.shape[2] for query in with_queries], dim=2))
    return [next(parts) if stream.has_queries else None for stream in streams]


def identity_attention(
    streams: Sequence[Stream],
    *,
    size: tuple[int, int] | None = None,
    scale: float | None = None,
    implementation: Implementation = "sdpa",
) -> list[Tensor | None]:
    """`joint_attention` in which a token of the first stream attends, within its own stream, only to itself.

    Perturbed-attention guidance (Ahn et al. 2024, arXiv:2403.17377): the image's self-attention map is the identity. As
    in diffusers' `PAGJointAttnProcessor2_0` an image token attends to the context too, and the context to all; without
    other streams the result is the first stream's values. The cost is image tokens x context tokens.
    """
    first, *others = streams
    if not others:
        return [first.value]
    scale = 1.0 / math.sqrt(first.key.shape[-1]) if scale is None else scale
    key = torch.cat([stream.key for stream in others], dim=2)
    value = torch.cat([stream.value for stream in others], dim=2)
    query = queries(first) * scale
    scores = torch.cat([(query * first.key).sum(-1, keepdim=True), query @ key.transpose(-1, -2)], dim=-1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    attended = weights[..., :1] * first.value + weights[..., 1:] @ value
    if not any(stream.has_queries for stream in others):
        return [attended, *(None for _ in others)]
    rest = [first._replace(query=None), *others]
    return [attended, *joint_attention(rest, scale=scale, implementation=implementation)[1:]]


def blurred_attention(
    streams: Sequence[Stream],
    *,
    size: tuple[int, int],
    sigma: float = math.inf,
    scale: float | None = None,
    implementation: Implementation = "sdpa",
) -> list[Tensor | None]:
    """`joint_attention` in which the queries of the first stream, tokens of a grid of `size` (height, width), are
    blurred by a Gaussian of `sigma` tokens; by default all of them are their mean.

    Smoothed energy guidance (Hong 2024, arXiv:2408.00760): scores are linear in the queries, so this blurs
    the energy of attention. The borders are those of the mean: weights beyond are left out, the rest sum to 1.
    """
    first, *others = streams
    query = rearrange(queries(first), "batch heads (h w) width -> batch heads h w width", h=size[0])
    for axis, length in zip((2, 3), size, strict=True):
        query = torch.movedim(torch.movedim(query, axis, -1) @ _blur(length, sigma, query), -1, axis)
    blurred = first._replace(query=rearrange(query, "batch heads h w width -> batch heads (h w) width"))
    return joint_attention([blurred, *others], scale=scale, implementation=implementation)


def _blur(length: int, sigma: float, like: Tensor) -> Tensor:
    """(length, length), each column the weights of one position."""
    position = torch.arange(length, dtype=torch.float32, device=like.device)
    return torch.softmax(-0.5 * ((position[:, None] - position) / sigma).square(), dim=0).to(like.dtype)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads * head_dim) -> (batch, heads, tokens, head_dim)."""
    return rearrange(x, "batch tokens (heads width) -> batch heads tokens width", heads=heads)


def merge_heads(x: Tensor) -> Tensor:
    """(batch, heads, tokens, head_dim) -> (batch, tokens, heads * head_dim)."""
    return rearrange(x, "batch heads tokens width -> batch tokens (heads width)")


def _sdpa(query, key, value, mask, causal, scale) -> Tensor:
    if query.requires_grad and query.dtype == torch.bfloat16 and query.device.type == "cpu":
        # The CPU kernel's backward takes several times as long in bfloat16 as in float32 (0.24 s against 0.04 s a step
        # of params/tiny, PyTorch 2.13), so attention that is differentiated runs in float32.
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        return _sdpa(query.float(), key.float(), value.float(), mask, causal, scale).to(query.dtype)
    if torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)
    try:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)
    except NotImplementedError as error:
        if not in_forward_mode():
            raise
        raise NotImplementedError(_NO_FORWARD_MODE) from error


_NO_FORWARD_MODE = (
    "PyTorch's fused attention (implementation='sdpa', the default) has no forward-mode derivatives (torch.func.jvp, "
    "jacfwd, hessian, transform.hvp, forward_ad): pass implementation='math', which mmdit.apply, controlnet.apply, "
    "ip_adapter.apply, pipeline.velocity, losses.flow_loss, vae, clip and t5 take; it needs memory for tokens x tokens"
)


def _math(query, key, value, mask, causal, scale) -> Tensor:
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * scale) @ key.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if causal:
        tokens, others = scores.shape[-2:]
        mask = torch.ones(tokens, others, dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value


_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"sdpa": _sdpa, "math": _math}
