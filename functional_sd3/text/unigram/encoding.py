"""Unigram tokenizer in its three modes: texts to ids and back, and the character span of each id."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor

from functional_sd3.text.batches import check_length, text_batch
from functional_sd3.text.unigram.normalizer import Span, aligned_words, sentence, words
from functional_sd3.text.unigram.tables import SPACE, WHITE_SPACE, AddedToken, Tables
from functional_sd3.text.unigram.viterbi import boundaries, segment

Mode = Literal["hf", "transformers", "sentencepiece"]


@overload
def apply(
    tables: Tables,
    texts: str | Sequence[str],
    *,
    length: int = 256,
    mode: Mode = "hf",
    typed_specials: bool = True,
) -> Tensor: ...
@overload
def apply(
    tables: Tables,
    texts: str | Sequence[str],
    *,
    length: None,
    mode: Mode = "hf",
    typed_specials: bool = True,
) -> list[list[int]]: ...


def apply(
    tables: Tables,
    texts: str | Sequence[str],
    *,
    length: int | None = 256,
    mode: Mode = "hf",
    typed_specials: bool = True,
) -> Tensor | list[list[int]]:
    """Ids of texts, each ended by the end token.

    Returns int64 (batch, length), cut (the end token stays) and filled with the pad id; with `length=None` a list of
    lists as long as the texts. Only the beginning of a long text that fits into `length` is segmented.
    `typed_specials=False` reads special tokens in the text, such as "</s>", as ordinary characters. Raises ValueError
    for a length below 1, an unknown mode, or text that has no UTF-8.
    """
    room = _room(length)
    _check_mode(mode)
    rows = [[*_ids(tables, text, mode, typed_specials, room), tables.eos_id] for text in text_batch(texts)]
    if length is None:
        return rows
    cut = [row if len(row) <= length else [*row[: length - 1], tables.eos_id] for row in rows]
    padded = [row + [tables.pad_id] * (length - len(row)) for row in cut]
    return torch.tensor(padded, dtype=torch.int64, device="cpu").reshape(len(rows), length)


def decode(tables: Tables, ids: Tensor | Sequence, *, skip_special: bool = True) -> str | list[str]:
    """The text of ids: one text for a flat sequence, a list of them for a batch.

    `skip_special` leaves out end, padding, unknown and sentinel tokens. Raises ValueError for ids that are no token.
    """
    ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if ids and not isinstance(ids[0], int):
        return [_decode(tables, list(row), skip_special) for row in ids]
    return _decode(tables, ids, skip_special)


def _decode(tables: Tables, ids: list[int], skip_special: bool) -> str:
    added = {token.id: token.content for token in tables.added}
    unknown = [index for index in ids if index not in added and not 0 <= index < len(tables.pieces)]
    if unknown:
        raise ValueError(f"ids {unknown[:5]} are no tokens; there are {len(tables.pieces)}")
    tokens = [added.get(index) or tables.pieces[index] for index in ids if not (skip_special and index in added)]
    # The space symbol that every text begins with is not part of the text.
    return "".join(token.replace(SPACE, " " if place else "") for place, token in enumerate(tokens))


def offsets(
    tables: Tables,
    texts: str | Sequence[str],
    *,
    length: int | None = None,
    mode: Mode = "hf",
    typed_specials: bool = True,
) -> list[list[Span]]:
    """Character spans [start, end) of each id of `apply(..., length=None)` in its text, as the library of `mode` has
    them.

    The end token has (0, 0). With a `length` those of the ids that `apply` keeps, without padding.
    """
    room = _room(length)
    _check_mode(mode)
    return [[*_spans(tables, text, mode, typed_specials, room)[:room], (0, 0)] for text in text_batch(texts)]


def normalize(tables: Tables, text: str, *, mode: Mode = "hf") -> str:
    """The normalised text that is segmented, without special tokens and with ordinary spaces: the result of
    `decode`."""
    _check_mode(mode)
    (text,) = text_batch(text)
    if mode == "sentencepiece":
        return sentence(tables, text)[0][1:].replace(SPACE, " ")
    return " ".join(words(tables, text, mode == "transformers" or tables.spacing.split))


def _room(length: Any) -> int | None:
    """Number of ids before the end token."""
    if length is None:
        return None
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length is {length!r:.60}; at least 1, the end token, is right, or None for no padding")
    check_length(length)
    return length - 1


def _check_mode(mode: str) -> None:
    if mode not in ("hf", "transformers", "sentencepiece"):
        raise ValueError(f"mode is {mode!r}; 'hf', 'transformers' or 'sentencepiece' is right")


def _ids(tables: Tables, text: str, mode: Mode, typed_specials: bool, room: int | None) -> list[int]:
    """The ids of a text, or the first of them, `room` at least if it has so many."""
    if mode == "sentencepiece":
        return [index for index, _ in segment(tables, tables.float32_lattice, sentence(tables, text)[0], room)]
    ids: list[int] = []
    lattice = tables.full_lattice if typed_specials else tables.ordinary_lattice
    id_of_word = tables.whole_word_ids.get
    split = mode == "transformers" or tables.spacing.split
    for _, part, token in _parts(tables, text, typed_specials):
        if token is not None:
            ids += tables.multi_token.get(token.id, (token.id,))
        # Every word has one id at least.
        for word in () if token is not None else words(tables, part, split)[:room]:
            whole = id_of_word(word)
            if whole is None:
                ids += [index for index, _ in segment(tables, lattice, SPACE + word, room)]
            else:
                ids.append(whole)
        if room is not None and len(ids) >= room:
            break
    return ids


def _spans(tables: Tables, text: str, mode: Mode, typed_specials: bool, room: int | None) -> list[Span]:
    if mode == "sentencepiece":
        written, origins = sentence(tables, text)
        cuts = boundaries(segment(tables, tables.float32_lattice, written))
        return [(origins[start], origins[end]) for start, end in pairwise(cuts)]
    spans: list[Span] = []
    lattice = tables.full_lattice if typed_specials else tables.ordinary_lattice
    split = mode == "transformers" or tables.spacing.split
    for start, part, token in _parts(tables, text, typed_specials):
        if token is not None:
            spans += [(start, start + len(part))] * len(tables.multi_token.get(token.id, (token.id,)))
        for word in () if token is not None else aligned_words(tables, part, split)[:room]:
            cuts = boundaries(segment(tables, lattice, "".join(character for character, _ in word)))
            spans += [(start + word[i][1][0], start + word[j - 1][1][1]) for i, j in pairwise(cuts)]
        if room is not None and len(spans) >= room:
            break
    return spans


def _parts(tables: Tables, text: str, typed_specials: bool) -> Iterator[tuple[int, str, AddedToken | None]]:
    """The text cut at typed special tokens, as (start, characters, token)."""
    done = 0
    if typed_specials and tables.added_pattern and tables.added_pattern.search(text):
        by_content = {token.content: token for token in tables.added}
        for match in tables.added_pattern.finditer(text):
            token = by_content[match[0]]
            start, end = match.span()
            while token.lstrip and start > done and text[start - 1] in WHITE_SPACE:
                start -= 1
            while token.rstrip and end < len(text) and text[end] in WHITE_SPACE:
                end += 1
            start = max(start, done)
            if done < start:
                yield done, text[done:start], None
            yield start, text[start:end], token
            done = end
    if done < len(text):
        yield done, text[done:], None
