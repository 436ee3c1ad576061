"""Scaled dot product attention, and joint attention over any number of token streams.

Esser et al. 2024, "Scaling Rectified Flow Transformers", section 4: each stream has weights of its own, one softmax
runs over the tokens of all of them.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from functional_sd3.core.dispatch import op
from functional_sd3.core.recompute import Recompute

Implementation = Literal["sdpa", "math"]

BLOCK_SCORES = 1 << 18
"""Scores (rows x keys, all heads) of one block of the formula: 1 MiB of float32, which fits a core's cache."""
MIN_ROWS = 64
"""Least rows of a block: products of few rows are slow (3 times the time with 8)."""


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
    """softmax(query key^T * scale + mask) value, with derivatives of every kind and order (Vaswani et al. 2017).

    query (batch, heads, tokens, head_dim), key and value (batch, heads, others, head_dim); `mask` is boolean (True =
    attend) or additive, broadcastable to (batch, heads, tokens, others); `scale` defaults to head_dim ** -0.5. A token
    that may attend to none has the output 0.
    Memory is linear in the tokens, also under jvp, vmap, derivatives of gradients and any nesting of them
    (docs/differentiation.md). implementation: "sdpa" runs PyTorch's fused kernels and `kernels.attention`; "math" is
    the formula in one piece, with memory for tokens x others, for tests to compare with.
    """
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} must be one of {sorted(_IMPLEMENTATIONS)}")
    if causal and mask is not None:
        raise ValueError("attention takes a mask or causal=True, not both; add the causal part to the mask")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _IMPLEMENTATIONS[implementation](query, key, value, mask, causal, scale)


@op
def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """`attention_formula`, a block of queries at a time, each block rematerialised: memory linear in the tokens.

    Differentiable in both modes, to every order, and mappable.
    """
    rows = block_rows(query, key)
    if query.shape[-2] <= rows:
        return attention_formula(query, key, value, mask, causal, scale)
    blocks: list[Tensor] = []
    for first in range(0, query.shape[-2], rows):
        block = partial(_attention_block, causal=causal, scale=scale, first=first)
        inputs = [query[..., first : first + rows, :], key, value]
        if mask is not None:
            per_row = mask.ndim > 1 and mask.shape[-2] > 1
            inputs.append(mask[..., first : first + rows, :] if per_row else mask)
        blocks += Recompute.apply(block, *inputs)
    return torch.cat(blocks, dim=-2)


def attention_formula(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, first: int = 0
) -> Tensor:
    """softmax(query key^T * scale + mask) value as written; `first` is the position of the first query if causal.

    Softmax is at least float32. A row without a finite score is 0, with finite derivatives.
    """
    scores = (query * scale) @ key.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if causal:
        rows, keys = scores.shape[-2:]
        visible = torch.ones(rows, keys, dtype=torch.bool, device=scores.device).tril(first)
        mask = visible if mask is None else _with_causal(mask, visible)
    if mask is None:
        return torch.softmax(scores, dim=-1).to(value.dtype) @ value
    hidden = ~mask if mask.dtype == torch.bool else mask == -math.inf
    blind = hidden.all(dim=-1, keepdim=True)
    scores = scores.masked_fill(hidden, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    return weights.to(value.dtype) @ value


def block_rows(query: Tensor, key: Tensor) -> int:
    """Queries of one block of `softmax_attention`."""
    scores_of_a_row = math.prod(query.shape[:-2]) * key.shape[-2]
    return max(MIN_ROWS, BLOCK_SCORES // max(1, scores_of_a_row))


def _attention_block(*inputs: Tensor, causal: bool, scale: float, first: int) -> tuple[Tensor]:
    query, key, value, *mask = inputs
    return (attention_formula(query, key, value, mask[0] if mask else None, causal, scale, first),)


def _with_causal(mask: Tensor, visible: Tensor) -> Tensor:
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -math.inf)


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


class Map(NamedTuple):
    """Softmax weights of one attention, by token."""

    weights: Tensor
    """(batch, heads, tokens with queries, all tokens); each row sums to 1."""
    queries: tuple[slice | None, ...]
    """Rows of each stream, None for one without queries."""
    keys: tuple[slice, ...]
    """Columns of each stream."""

    def between(self, query_stream: int, key_stream: int) -> Tensor:
        """Weights (batch, heads, tokens, others) of the tokens of one stream for those of another; 0 is the image."""
        rows = self.queries[query_stream]
        if rows is None:
            raise ValueError(f"stream {query_stream} has no queries here")
        return self.weights[:, :, rows, self.keys[key_stream]]


def maps(
    run: Callable[[Mapping[int, Callable[..., Any]]], Any],
    blocks: Collection[int],
    *,
    keep: Callable[[Map], Any] = lambda weights: weights,
) -> tuple[Any, dict[int, list[Any]]]:
    """(run(attend), {block: [its `Map`s]}): attention weights of some blocks beside what is computed with them.

        velocity, weights = attention.maps(lambda attend: mmdit.apply(..., attend=attend), blocks=[3])
        weights[3][0].between(0, 1)  # of each image token for each token of the prompt

    keep: what is kept of a map, which is as large as tokens x tokens of every head. The rest as in `record`.
    """
    return record(run, blocks, keep=lambda streams: keep(_map(streams)))


def record(
    run: Callable[[Mapping[int, Callable[..., Any]]], Any],
    blocks: Collection[int],
    *,
    keep: Callable[[Sequence[Stream]], Any] = lambda streams: streams[0]._replace(query=None),
) -> tuple[Any, dict[int, list[Any]]]:
    """(run(attend), {block: [keep(streams) of each of its attentions]}): what some blocks attend with, such as the keys
    and values of their first stream, the image, for `attention_variants.replay`.

    A block has one attention, or two where it has a second one over the image alone, for each call of the network in
    `run`, in order. Guidance evaluates the rows of several conditionings in one call, those of the prompts first. Not
    with a block_transform that computes twice.
    """
    kept: dict[int, list[Any]] = {block: [] for block in blocks}

    def recording(block: int) -> Callable[[Sequence[Stream]], list[Tensor | None]]:
        def attend(streams: Sequence[Stream]) -> list[Tensor | None]:
            kept[block].append(keep(streams))
            return joint_attention(streams)

        return attend

    return run({block: recording(block) for block in kept}), kept


def _map(streams: Sequence[Stream]) -> Map:
    query = torch.cat([stream.query for stream in streams if stream.query is not None], dim=2)
    key = torch.cat([stream.key for stream in streams], dim=2)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    weights = torch.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=-1)
    rows = iter(_slices([stream.query.shape[2] for stream in streams if stream.query is not None]))
    queries = tuple(next(rows) if stream.has_queries else None for stream in streams)
    return Map(weights, queries, tuple(_slices([stream.key.shape[2] for stream in streams])))


def _slices(lengths: Sequence[int]) -> list[slice]:
    ends = list(accumulate(lengths))
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


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


_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"sdpa": softmax_attention, "math": attention_formula}
