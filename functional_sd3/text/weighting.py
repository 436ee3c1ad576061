"""Prompts with emphasis, `a (red:1.3) cat`, and prompts of any length: what they mean token by token.

The notation is that of the community's programs (AUTOMATIC1111, ComfyUI): `(words)` weighs 1.1, `(words:1.3)` what it
says, groups multiply; `\\(`, `\\)` and `\\\\` are the characters themselves, and so is a parenthesis without its other
half. The prompt is tokenised as it reads without the notation. A weight w moves what an encoder says of a token from
what it says of the empty prompt at the same place: e + w (z - e), ComfyUI's rule. Prompts that CLIP has no room for are
read in chunks, each between a start and an end token, one after the other in the context; T5 reads the whole prompt.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.text import bpe, unigram

USUAL = 1.1
"""The weight of a group that does not say one."""


class Weighted(NamedTuple):
    """A prompt without its notation, and the weight of each of its characters."""

    text: str
    weights: tuple[float, ...]


class Rows(NamedTuple):
    """Tokens of several prompts and their weights, both (batch, chunks, tokens) for CLIP, (batch, tokens) for T5."""

    ids: Tensor
    weights: Tensor


class _Character(NamedTuple):
    text: str
    weight: float
    escaped: bool


def parse(prompt: str) -> Weighted:
    """What a prompt says and how much each character of it weighs. Nothing a person may type is an error."""
    found: list[_Character] = []
    opened: list[int] = []
    escaped = False
    for character in prompt:
        if not escaped and character == "\\":
            escaped = True
            continue
        if escaped and character not in "()\\":
            found.append(_Character("\\", 1.0, True))
            escaped = False
        if character == ")" and not escaped and opened:
            _close(found, opened.pop())
        else:
            if character == "(" and not escaped:
                opened.append(len(found))
            found.append(_Character(character, 1.0, escaped))
        escaped = False
    if escaped:
        found.append(_Character("\\", 1.0, True))
    return Weighted("".join(one.text for one in found), tuple(one.weight for one in found))


def plain(prompts: Sequence[str]) -> list[Weighted]:
    """Prompts whose parentheses are parentheses."""
    return [Weighted(prompt, (1.0,) * len(prompt)) for prompt in prompts]


def clip_rows(tables: bpe.Tables, prompts: Sequence[Weighted], length: int, *, long: bool) -> list[list[Rows]]:
    """For each prompt its chunks of `length` tokens, (tokens,) each: one, which is cut, or with `long` as many as it
    takes."""
    room = length - 2
    texts = [prompt.text for prompt in prompts]
    every = zip(bpe.apply(tables, texts, length=None), bpe.offsets(tables, texts), prompts, strict=True)
    found = []
    for ids, spans, prompt in every:
        weights = _token_weights(spans, prompt.weights)
        starts = range(1, max(len(ids) - 1, 2), room) if long else [1]
        chunks = [
            (ids[start : min(start + room, len(ids) - 1)], weights[start : min(start + room, len(ids) - 1)])
            for start in starts
        ]
        found.append([_padded([tables.bos_id, *i], [1.0, *w], tables.eos_id, tables.pad_id, length) for i, w in chunks])
    return found


def stack_chunks(prompts: Sequence[Sequence[Rows]], chunks: int, blank: Rows) -> Rows:
    """Prompts of several numbers of chunks as one batch: those that are short end in blank ones."""
    filled = [[*rows, *[blank] * (chunks - len(rows))] for rows in prompts]
    ids, weights = (
        torch.stack([torch.stack([getattr(row, name) for row in rows]) for rows in filled]) for name in Rows._fields
    )
    return Rows(ids, weights)


def t5_rows(tables: unigram.Tables, prompts: Sequence[Weighted], length: int) -> Rows:
    """The tokens of each prompt, cut or padded to `length`."""
    texts = [prompt.text for prompt in prompts]
    every = zip(unigram.apply(tables, texts, length=None), unigram.offsets(tables, texts), prompts, strict=True)
    rows = []
    for ids, spans, prompt in every:
        kept = min(len(ids), length) - 1
        weights = _token_weights(spans, prompt.weights)
        rows.append(_padded(ids[:kept], weights[:kept], tables.eos_id, tables.pad_id, length))
    return Rows(*(torch.stack([getattr(row, name) for row in rows]) for name in Rows._fields))


def reweigh(features: Tensor, blank: Tensor, weights: Tensor) -> Tensor:
    """e + w (z - e), for features z (batch, tokens, width), those of the empty prompt e (1 or batch, tokens, width) and
    weights w (batch, tokens). Where w is 1 it is z to the bit."""
    weights = weights.to(features)[..., None]
    return torch.where(weights == 1, features, blank + weights * (features - blank))


def _close(found: list[_Character], start: int) -> None:
    """Take the group that began at `start` out of its parentheses."""
    written = "".join("\0" if one.escaped else one.text for one in found[start + 1 :])
    match = _NUMBER.search(written)
    weight = float(match[1]) if match else USUAL
    inside = found[start + 1 : start + 1 + match.start() if match else None]
    found[start:] = [one._replace(weight=one.weight * weight) for one in inside]


def _token_weights(spans: Sequence[tuple[int, int]], weights: Sequence[float]) -> list[float]:
    # A token may begin with the space before its word, so its last character speaks for it.
    return [weights[end - 1] if end > start else 1.0 for start, end in spans]


def _padded(ids: Sequence[int], weights: Sequence[float], eos: int, pad: int, length: int) -> Rows:
    rest = length - 1 - len(ids)
    return Rows(
        torch.tensor([*ids, eos, *[pad] * rest], dtype=torch.int64, device="cpu"),
        torch.tensor([*weights, 1.0, *[1.0] * rest], dtype=torch.float32, device="cpu"),
    )


_NUMBER: Any = re.compile(r"\s*:\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*$")
