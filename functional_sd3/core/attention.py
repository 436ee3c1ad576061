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

Implementation = Literal["sdpa", "math"]


class Stream(NamedTuple):
    """Queries, keys and values of one stream of tokens, each (batch, heads, tokens, head_dim).

    `query=None`: the stream is attended to, but asks nothing (SD3's context in the last block).
    """

    query: Tensor | None
    key: Tensor
    value: Tensor


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
    """Attention in which every stream's queries see the keys and values of all streams.

    Returns one tensor (batch, heads, tokens, head_dim) a stream, None where the stream has no queries. `mask` is over
    the concatenated tokens: (..., sum of asking tokens, sum of tokens). Raises ValueError when no stream asks.
    """
    asking = [stream.query for stream in streams if stream.query is not None]
    if not asking:
        raise ValueError("joint_attention needs at least one stream with queries")
    key = torch.cat([stream.key for stream in streams], dim=2)
    value = torch.cat([stream.value for stream in streams], dim=2)
    query = torch.cat(asking, dim=2)
    attended = attention(query, key, value, mask=mask, scale=scale, implementation=implementation)
    parts = iter(attended.split([query.shape[2] for query in asking], dim=2))
    return [None if stream.query is None else next(parts) for stream in streams]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads * head_dim) -> (batch, heads, tokens, head_dim)."""
    return rearrange(x, "batch tokens (heads width) -> batch heads tokens width", heads=heads)


def merge_heads(x: Tensor) -> Tensor:
    """(batch, heads, tokens, head_dim) -> (batch, tokens, heads * head_dim)."""
    return rearrange(x, "batch heads tokens width -> batch tokens (heads width)")


def _sdpa(query, key, value, mask, causal, scale) -> Tensor:
    if query.requires_grad and query.dtype == torch.bfloat16 and query.device.type == "cpu":
        # The CPU kernel's backward takes several times as long in bfloat16 as in float32 (0.24 s against 0.04 s a step
        # of params/tiny, PyTorch 2.13), so what is differentiated is attended in float32.
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        return _sdpa(query.float(), key.float(), value.float(), mask, causal, scale).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)


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
