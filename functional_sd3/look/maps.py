"""Attention between the image and groups of tokens of the prompt, in memory linear in the tokens."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.attention import Stream, block_rows, queries


class WordMaps(NamedTuple):
    """Softmax weights of one joint attention, means over its heads, float32 (float64 where the queries are).

    to_words (batch, groups, image tokens): how much of what an image token receives comes from the tokens of a group, a
    sum over the group. from_words, of the same shape: how much of what a token of a group receives comes from an image
    token, a mean over the group; None where the context has no queries, as in the last block. image (batch, image
    tokens): how much of what an image token receives comes from the image. Where each token of the context is in one
    group, `to_words.sum(1) + image` is 1.
    """

    to_words: Tensor
    from_words: Tensor | None
    image: Tensor


def word_maps(streams: Sequence[Stream], groups: Tensor) -> WordMaps:
    """Weights of softmax(q k^T / sqrt(d)) over the image and the context, read off for groups of the context's tokens.

    streams: of the image and of the context, as `attend` of `mmdit.apply` gets them. groups (groups, context tokens):
    1 where a token is in a group, else 0. Rows of the softmax are computed some at a time and reduced at once, so that
    the memory grows with the tokens, not with their square (Vaswani et al. 2017; maps of words by image tokens as in
    DAAM, Tang et al. 2022, arXiv:2210.04885).
    """
    image, context = streams
    key = torch.cat([image.key, context.key], dim=2)
    count = image.key.shape[2]
    membership = groups.to(key.device, torch.promote_types(key.dtype, torch.float32))
    to_words, from_image = [], []
    for weights in _row_blocks(queries(image), key):
        to_words.append(weights[..., count:] @ membership.T)
        from_image.append(weights[..., :count].sum(-1))
    from_words = None
    if context.query is not None:
        mean = membership / membership.sum(1, keepdim=True).clamp_min(1)
        # Rows of tokens without a group are not computed.
        used = membership.any(0).nonzero()[:, 0]
        from_words, first = mean.new_zeros(len(key), len(groups), count), 0
        for weights in _row_blocks(context.query[:, :, used], key):
            last = first + weights.shape[1]
            from_words = from_words + mean[:, used[first:last]] @ weights[..., :count]
            first = last
    return WordMaps(torch.cat(to_words, 1).transpose(1, 2), from_words, torch.cat(from_image, 1))


def _row_blocks(query: Tensor, key: Tensor) -> Iterator[Tensor]:
    """Softmax weights, the mean over the heads, (batch, rows, keys), of some queries at a time."""
    scale = query.shape[-1] ** -0.5
    rows = block_rows(query, key)
    for first in range(0, query.shape[2], rows):
        scores = (query[:, :, first : first + rows] * scale) @ key.transpose(-1, -2)
        yield torch.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=-1).mean(1)
