"""Prompt weighting, `a (red:1.3) cat`, and prompts longer than CLIP: tokens with their weights.

The notation is that of the community's programs (AUTOMATIC1111, ComfyUI): `(words)` has the weight 1.1, `(words:1.3)`
1.3, nested groups multiply; `\\(`, `\\)` and `\\\\` are the characters themselves, and so is an unmatched
parenthesis. The prompt is tokenised without the notation. A weight w scales a token's features z against those of the
empty prompt e at the same position: e + w (z - e), ComfyUI's rule. Prompts longer than CLIP's length are encoded in
chunks, each between a start and an end token, one after the other in the context; T5 reads the whole prompt.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.text import bpe, unigram

DEFAULT_WEIGHT = 1.1
"""The weight of a group without a number."""


class Weighted(NamedTuple):
    """A prompt without its notation, and the weight of each of its characters."""

    text: str
    weights: tuple[float, ...]


class Rows(NamedTuple):
    """Tokens of several prompts and their weights, both (batch, chunks, tokens) for CLIP, (batch, tokens) for T5."""

    ids: Tensor
    weights: Tensor


class _Group(NamedTuple):
    """End of a group and its own weight; `_weights` multiplies it with those of the groups around it."""

    end: int
    weight: float


def parse(prompt: str) -> Weighted:
    """A prompt's text without the notation, and the weight of each character. Every string is a valid prompt.

    Time grows with the length of the prompt alone, however deep its parentheses are.
    """
    # None where a character belongs to the notation; escaped characters end no group and are no part of a weight.
    characters: list[str | None] = []
    escaped_at: set[int] = set()
    open_groups: list[int] = []
    groups: dict[int, _Group] = {}
    escaped = False
    for character in prompt:
        if not escaped and character == "\\":
            escaped = True
            continue
        if escaped and character not in "()\\":
            escaped_at.add(len(characters))
            characters.append("\\")
            escaped = False
        if character == ")" and not escaped and open_groups:
            start = open_groups.pop()
            groups[start] = _close(characters, escaped_at, start)
        else:
            if escaped:
                escaped_at.add(len(characters))
            elif character == "(":
                open_groups.append(len(characters))
            characters.append(character)
        escaped = False
    if escaped:
        characters.append("\\")
    weights = _weights(len(characters), groups)
    kept = [(character, weight) for character, weight in zip(characters, weights, strict=True) if character is not None]
    return Weighted("".join(character for character, _ in kept), tuple(weight for _, weight in kept))


def unweighted(prompts: Sequence[str]) -> list[Weighted]:
    """Prompts without notation: every character has the weight 1."""
    return [Weighted(prompt, (1.0,) * len(prompt)) for prompt in prompts]


def clip_rows(tables: bpe.Tables, prompts: Sequence[Weighted], length: int, *, long: bool) -> list[list[Rows]]:
    """Chunks of `length` tokens of each prompt, (tokens,) each: one, truncated, or with `long` as many as needed."""
    room = length - 2
    texts = [prompt.text for prompt in prompts]
    limit = None if long else length
    encoded = zip(_clip_ids(tables, texts, limit), bpe.offsets(tables, texts, length=limit), prompts, strict=True)
    rows = []
    for ids, spans, prompt in encoded:
        ids = ids[: len(spans)]
        weights = _token_weights(spans, prompt.weights)
        starts = range(1, max(len(ids) - 1, 2), room) if long else [1]
        chunks = [
            (ids[start : min(start + room, len(ids) - 1)], weights[start : min(start + room, len(ids) - 1)])
            for start in starts
        ]
        rows.append([_padded([tables.bos_id, *i], [1.0, *w], tables.eos_id, tables.pad_id, length) for i, w in chunks])
    return rows


def _clip_ids(tables: bpe.Tables, texts: Sequence[str], length: int | None) -> list[list[int]]:
    return bpe.apply(tables, texts, length=None) if length is None else bpe.apply(tables, texts, length=length).tolist()


def stack_chunks(prompts: Sequence[Sequence[Rows]], chunks: int, blank: Rows) -> Rows:
    """Prompts as one batch, padded with blank chunks to the same number of chunks."""
    filled = [[*rows, *[blank] * (chunks - len(rows))] for rows in prompts]
    ids, weights = (
        torch.stack([torch.stack([getattr(row, name) for row in rows]) for rows in filled]) for name in Rows._fields
    )
    return Rows(ids, weights)


def t5_rows(tables: unigram.Tables, prompts: Sequence[Weighted], length: int) -> Rows:
    """The tokens of each prompt, cut or padded to `length`."""
    texts = [prompt.text for prompt in prompts]
    ids = unigram.apply(tables, texts, length=length).tolist()
    encoded = zip(ids, unigram.offsets(tables, texts, length=length), prompts, strict=True)
    rows = []
    for ids, spans, prompt in encoded:
        count = len(spans) - 1
        weights = _token_weights(spans, prompt.weights)
        rows.append(_padded(ids[:count], weights[:count], tables.eos_id, tables.pad_id, length))
    return Rows(*(torch.stack([getattr(row, name) for row in rows]) for name in Rows._fields))


def reweigh(features: Tensor, blank: Tensor, weights: Tensor) -> Tensor:
    """e + w (z - e), for features z (batch, tokens, width), those of the empty prompt e (1 or batch, tokens, width) and
    weights w (batch, tokens). Where w is 1 it is z to the bit."""
    weights = weights.to(features)[..., None]
    return torch.where(weights == 1, features, blank + weights * (features - blank))


def _close(characters: list[str | None], escaped_at: set[int], start: int) -> _Group:
    """The group from `start` to here, whose parenthesis and weight are removed from `characters`."""
    characters[start] = None
    end = len(characters)
    tail = range(max(start + 1, end - _MAX_TAIL), end)
    # From the colon on; an escaped character is no part of a weight.
    written = "".join("\0" if index in escaped_at else characters[index] or "" for index in tail)
    head, colon, number = written.rpartition(":")
    match = _NUMBER.fullmatch(number) if colon else None
    if not match:
        return _Group(end, DEFAULT_WEIGHT)
    taken = len(written) - len(head.rstrip())
    for index in reversed(tail):
        if taken and characters[index] is not None:
            characters[index] = None
            taken -= 1
    return _Group(end, float(match[1]))


def _weights(count: int, groups: dict[int, _Group]) -> list[float]:
    """Weight of each of `count` characters: the product of the weights of the groups that it is in."""
    weights, enclosing = [], [_Group(count, 1.0)]
    for index in range(count):
        while len(enclosing) > 1 and index >= enclosing[-1].end:
            enclosing.pop()
        if index in groups:
            end, weight = groups[index]
            # Finite, so that a weight of 0 within thousands of parentheses is 0.
            enclosing.append(_Group(end, min(max(enclosing[-1].weight * weight, -_HEAVIEST), _HEAVIEST)))
        weights.append(enclosing[-1].weight)
    return weights


def _token_weights(spans: Sequence[tuple[int, int]], weights: Sequence[float]) -> list[float]:
    # A token may begin with the space before its word, so its weight is its last character's.
    return [weights[end - 1] if end > start else 1.0 for start, end in spans]


def _padded(ids: Sequence[int], weights: Sequence[float], eos: int, pad: int, length: int) -> Rows:
    padding = length - 1 - len(ids)
    return Rows(
        torch.tensor([*ids, eos, *[pad] * padding], dtype=torch.int64, device="cpu"),
        torch.tensor([*weights, 1.0, *[1.0] * padding], dtype=torch.float32, device="cpu"),
    )


_NUMBER: Any = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*")
_MAX_TAIL = 64
"""Most characters of a group's weight, with its colon and the white space around."""
_HEAVIEST = 1e30
