"""Byte-pair encoding of CLIP's tokenizer: texts to ids, and the character span of each id."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, overload

import numpy
import torch
from torch import Tensor

from functional_sd3.text.batches import check_length, text_batch
from functional_sd3.text.bpe.merge import END_OF_WORD, merge, merge_first, symbols_of
from functional_sd3.text.bpe.tables import Cuts, Tables, cuts_of
from functional_sd3.text.bpe.words import WORDS, normalize, normalize_aligned, spans, words


@overload
def apply(
    tables: Tables,
    texts: str | Sequence[str],
    *,
    length: int = 77,
    pad_token: str | int | None = None,
    special_tokens: bool | Collection[str] = True,
    clean: Callable[[str], str] | None = None,
) -> Tensor: ...
@overload
def apply(
    tables: Tables,
    texts: str | Sequence[str],
    *,
    length: None,
    pad_token: str | int | None = None,
    special_tokens: bool | Collection[str] = True,
    clean: Callable[[str], str] | None = None,
) -> list[list[int]]: ...


def apply(
    tables: Tables,
    texts: str | Sequence[str],
    *,
    length: int | None = 77,
    pad_token: str | int | None = None,
    special_tokens: bool | Collection[str] = True,
    clean: Callable[[str], str] | None = None,
) -> Tensor | list[list[int]]:
    """Ids of `texts` (one string is a batch of one): LongTensor (batch, length), or unpadded lists for `length=None`.

    A row is the start token, the text cut to `length - 2` tokens, the end token, and padding with the tokenizer's own
    pad or `pad_token` (a string or an id). `special_tokens` names the special tokens typed into a text count as such:
    True all (transformers' behaviour: for SD3's second tokenizer, which pads with "!", every "!" is cut out and becomes
    the pad id), False none, or the ones listed (listing the start and the end token alone is Stability's behaviour).
    `clean` is applied to each text first, such as `openai_clean`, `basic_clean` or `ftfy.fix_text`. Only the beginning
    of a long text that fits into `length` is merged. Raises ValueError for a length below 2, a text that is not a
    string or holds lone surrogates, an unknown pad token.
    """
    _check_length(length)
    cuts = tables.cuts if special_tokens is True else cuts_of(tables.specials, special_tokens)
    memo: dict[str, list[int]] = {}
    room = None if length is None else length - 2
    batch = [_encode(tables, cuts, clean(text) if clean else text, memo, room) for text in text_batch(texts)]
    bos, eos = [tables.bos_id], [tables.eos_id]
    if length is None:
        return [bos + content + eos for content in batch]
    pad = [tables.pad_id if pad_token is None else _pad_id(tables, pad_token)]
    rows = [bos + content[: length - 2] + eos + pad * (length - 2 - len(content)) for content in batch]
    # by way of numpy: torch.tensor reads a list of integers several times slower
    return torch.from_numpy(numpy.array(rows, dtype=numpy.int64).reshape(len(rows), length))


def _check_length(length: Any) -> None:
    if length is not None and (isinstance(length, bool) or not isinstance(length, int)):
        raise ValueError(f"length is {length!r:.60}; a whole number of at least 2 is right, or None for no padding")
    if length is not None and length < 2:
        raise ValueError(f"length {length} has no room for the start and the end token; at least 2 is right")
    check_length(length)


def _pad_id(tables: Tables, pad_token: str | int) -> int:
    if isinstance(pad_token, str):
        ids = {**tables.vocab, **{special.content: special.id for special in tables.specials}}
        if pad_token not in ids:
            raise ValueError(f"pad_token {pad_token!r} is not in the vocabulary of {len(tables.names)} tokens")
        return ids[pad_token]
    if pad_token not in tables.names:
        raise ValueError(f"pad_token {pad_token} is not an id of the vocabulary of {len(tables.names)} tokens")
    return pad_token


def _encode(tables: Tables, cuts: Cuts, text: str, memo: dict[str, list[int]], room: int | None) -> list[int]:
    """The ids of a text, or the first of them, `room` at least if it has so many."""
    ids: list[int] = []
    id_of_word = tables.whole_word_ids.get
    for raw in _cut(cuts.raw, text):
        if raw.special:
            ids += _ids_of(tables, cuts, raw.text)
        for part in () if raw.special else _cut(cuts.normalized, normalize(raw.text)):
            if part.special:
                ids += _ids_of(tables, cuts, part.text)
                continue
            # Every word has one id at least.
            for word in words(tables.pattern, part.text, room):
                whole = id_of_word(word)
                if whole is not None:
                    ids.append(whole)
                    continue
                if word not in memo:
                    memo[word] = _word(tables, word, room)
                ids += memo[word]
            if room is not None and len(ids) >= room:
                return ids
        if room is not None and len(ids) >= room:
            return ids
    return ids


def _ids_of(tables: Tables, cuts: Cuts, token: str) -> Sequence[int]:
    first = cuts.ids[token]
    return tables.multi_token.get(first, (first,))


class _Part(NamedTuple):
    start: int
    text: str
    special: bool


def _cut(pattern: re.Pattern[str] | None, text: str) -> Iterable[_Part]:
    """`text` in parts: the matches of `pattern` and the text between them."""
    if pattern is None or pattern.search(text) is None:
        return (_Part(0, text, False),)
    return _parts(pattern, text)


def _parts(pattern: re.Pattern[str], text: str) -> Iterator[_Part]:
    position = 0
    for match in pattern.finditer(text):
        if position < match.start():
            yield _Part(position, text[position : match.start()], False)
        yield _Part(match.start(), match.group(), True)
        position = match.end()
    yield _Part(position, text[position:], False)


def _word(tables: Tables, word: str, room: int | None = None) -> list[int]:
    """Ids of one word, or the first `room`. A literal that the pattern kept whole is split into words here."""
    ids: list[int] = []
    for part in words(WORDS, word):
        symbols = symbols_of(part.encode(), tables.inner, tables.final)
        ids += merge(tables.merges, symbols) if room is None else merge_first(tables.merges, symbols, room)
    return ids


def offsets(
    tables: Tables,
    texts: str | Sequence[str],
    *,
    length: int | None = None,
    special_tokens: bool | Collection[str] = True,
) -> list[list[tuple[int, int]]]:
    """Character spans (start, end) of each id of `apply(tables, texts, length=None)` in its text.

    With a `length` those of the ids that `apply` keeps, without padding. The start and end tokens have (0, 0). As in
    `tokenizers`, a token that is part of a character spans all of it, and a character that NFC composed spans the first
    of the characters it was made of.
    """
    cuts = tables.cuts if special_tokens is True else cuts_of(tables.specials, special_tokens)
    _check_length(length)
    room = None if length is None else length - 2
    return [[(0, 0), *islice(_offsets(tables, cuts, text), room), (0, 0)] for text in text_batch(texts)]


def _offsets(tables: Tables, cuts: Cuts, text: str) -> Iterator[tuple[int, int]]:
    for raw in _cut(cuts.raw, text):
        if raw.special:
            yield from [(raw.start, raw.start + len(raw.text))] * len(_ids_of(tables, cuts, raw.text))
            continue
        normalized, sources = normalize_aligned(raw.text)
        places = [raw.start + source for source in sources]
        for part in _cut(cuts.normalized, normalized):
            if part.special:
                place = places[part.start], places[part.start + len(part.text) - 1] + 1
                yield from [place] * len(_ids_of(tables, cuts, part.text))
                continue
            for start, end in spans(tables.pattern, part.text):
                here = places[part.start + start : part.start + end]
                yield from _word_offsets(tables, part.text[start:end], here)


def _word_offsets(tables: Tables, word: str, places: Sequence[int]) -> Iterator[tuple[int, int]]:
    bytewise = [place for character, place in zip(word, places, strict=True) for _ in character.encode()]
    position = 0
    for i in _word(tables, word):
        size = 1 if i == tables.unk_id else len(tables.names[i].removesuffix(END_OF_WORD))
        yield bytewise[position], bytewise[position + size - 1] + 1
        position += size
