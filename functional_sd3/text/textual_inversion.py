"""Textual inversion: new words as embedding vectors beside the learned embeddings of a text encoder.

Gal et al. 2022, "An Image is Worth One Word" (arXiv:2208.01618). A word becomes an added token of the tokenizers and
new rows of the embedding tables; where it is typed, it is replaced by all of its vectors, one token each. All functions
return new tables and new trees; their arguments are unchanged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.types import Params
from functional_sd3.text import bpe, unigram
from functional_sd3.text.bpe.check import Special
from functional_sd3.text.bpe.tables import cuts_of
from functional_sd3.text.unigram.tables import pattern_of

ENCODERS = ("clip_l", "clip_g", "t5")


class Word(NamedTuple):
    """A word and its embedding vectors for each encoder: "clip_l", "clip_g" and "t5" -> (vectors, width)."""

    token: str
    vectors: Mapping[str, Tensor]


class Learned(NamedTuple):
    """A model with added words: the first arguments of `pipeline.generate`."""

    params: dict[str, Params]
    config: Any
    tokenizers: Any


def add(params: dict[str, Params], config: Any, tokenizers: Any, *words: Word) -> Learned:
    """The model with words added, in order; an encoder for which a word has no vectors tokenizes it as ordinary text.

    params, config, tokenizers: of a model (`weights.Model`), some of whose components may be absent. A word takes the
    ids that follow the tokenizer's; embedding rows without a token (T5 has 28 of them) are used first. CLIPs that pool
    at a text's highest id (`clip.LEGACY_EOS_ID`) get the end token's id as `eos_id`, since added tokens are higher.

    Raises ValueError when a word is empty or already a token, has vectors of another width than the encoder's, for no
    encoder of the model, or in different numbers for different encoders.
    """
    for word in words:
        _check(word, params, config, tokenizers)
        for name in ENCODERS:
            if name in word.vectors and name in params:
                tables = getattr(tokenizers, name)
                first, count = _next_id(tables), len(word.vectors[name])
                ids = tuple(range(first, first + count))
                tokenizers = _with(tokenizers, name, _EXTEND[name](tables, word.token, ids))
                params = {**params, name: _with_rows(params[name], _TABLE[name], first, word.vectors[name])}
                rows = params[name][_TABLE[name]]["weight"].shape[0]
                changes = {"vocab": rows} | ({} if name == "t5" else {"eos_id": tables.eos_id})
                config = _with(config, name, replace(getattr(config, name), **changes))
    return Learned(params, config, tokenizers)


def empty_tables(config: Any, encoders: Sequence[str]) -> dict[str, Params]:
    """The embedding tables of these encoders without values, on the meta device: enough for `add` to find new ids."""
    sizes = {name: getattr(config, name) for name in ENCODERS if name in encoders}
    return {
        name: {_TABLE[name]: {"weight": torch.empty(size.vocab, size.width, dtype=torch.float32, device="meta")}}
        for name, size in sizes.items()
    }


def first_ids(tokenizers: Any, encoders: Sequence[str]) -> dict[str, int]:
    """The id that the first vector of the next word gets in each encoder, given the tokenizers without it."""
    return {name: _next_id(getattr(tokenizers, name)) for name in ENCODERS if name in encoders}


def with_vectors(params: Params, vectors: Mapping[str, Tensor], first: Mapping[str, int]) -> Params:
    """The parameters of `add` for vectors that are trained: they are kept beside the tables, which are not copied.

    vectors: encoder -> (vectors, width); first: `first_ids` of the tokenizers without the word, which is the last one.
    """

    def extended(name: str) -> Params:
        table = params[name][_TABLE[name]]["weight"][: first[name]]
        return {**params[name], _TABLE[name]: {"weight": table, "added": vectors[name]}}

    return {name: extended(name) if name in vectors else part for name, part in params.items()}


def initial_vectors(
    params: Params, tokenizers: Any, text: str, encoders: Sequence[str], count: int
) -> dict[str, Tensor]:
    """Embeddings to start a word of `count` vectors from: encoder -> float32 (count, width), those of `text`.

    Where the text has at least two tokens and the word as many vectors, its first tokens in order; else the mean of all
    its tokens, for every vector. Raises ValueError where an encoder's tokenizer has no token for the text.
    """
    vectors = {}
    for name in (each for each in ENCODERS if each in encoders):
        ids = _tokens_of(getattr(tokenizers, name), text)
        if not ids:
            raise ValueError(f"{text!r} has no token of {name} to start from; name a word that it knows")
        rows = params[name][_TABLE[name]]["weight"][torch.tensor(ids, dtype=torch.int64, device="cpu")].float()
        one_each = len(ids) > 1 and count >= len(ids)
        mean = rows.mean(0, keepdim=True)
        vectors[name] = torch.cat([rows, mean.expand(count - len(ids), -1)]) if one_each else mean.repeat(count, 1)
    return vectors


def names(token: str, count: int) -> list[str]:
    """Token names of a word, as in diffusers: itself, then <word>_1, <word>_2, ..."""
    return [token, *(f"{token}_{index}" for index in range(1, count))]


def _check(word: Word, params: Mapping[str, Params], config: Any, tokenizers: Any) -> None:
    unknown = sorted(set(word.vectors) - set(ENCODERS))
    if unknown:
        raise ValueError(f"{word.token!r} has vectors for {unknown[0]!r}; encoders are {', '.join(ENCODERS)}")
    if not word.token.strip() or word.token != word.token.strip():
        raise ValueError(f"the word {word.token!r} must not be empty, nor begin or end with white space")
    present = [name for name in word.vectors if name in params]
    if not present:
        listed = ", ".join(word.vectors) or "no encoder"
        raise ValueError(f"{word.token!r} has vectors for {listed}, of which the model has none")
    counts = {name: len(word.vectors[name]) for name in word.vectors}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ValueError(f"{word.token!r} must have as many vectors for each encoder, at least 1; it has {counts}")
    for name in present:
        width, shape = getattr(config, name).width, tuple(word.vectors[name].shape)
        if len(shape) != 2 or shape[1] != width:
            raise ValueError(f"{word.token!r} has vectors of shape {list(shape)} for {name}, whose width is {width}")
        tables, rows = getattr(tokenizers, name), params[name][_TABLE[name]]["weight"].shape[0]
        if tables is not None and rows < _next_id(tables):
            raise ValueError(f"the tokenizer of {name} has {_next_id(tables)} tokens, its encoder {rows} embeddings")
        if tables is None:
            raise ValueError(f"{word.token!r} has vectors for {name}, whose tokenizer is absent")
        known = _contents(tables)
        taken = [token for token in names(word.token, len(word.vectors[name])) if token in known]
        if taken:
            raise ValueError(f"{taken[0]!r} is a token of {name} already; choose another word")


def _contents(tables: Any) -> set[str]:
    if isinstance(tables, bpe.Tables):
        return set(tables.names.values())
    return {*tables.pieces, *(token.content for token in tables.added)}


def _next_id(tables: Any) -> int:
    if isinstance(tables, bpe.Tables):
        return max(tables.names) + 1
    return max(len(tables.pieces) - 1, *(token.id for token in tables.added)) + 1


def _tokens_of(tables: Any, text: str) -> list[int]:
    """Ids of a text without start, end and unknown tokens."""
    if isinstance(tables, bpe.Tables):
        return bpe.apply(tables, text, length=None)[0][1:-1]
    return [index for index in unigram.apply(tables, text, length=None)[0][:-1] if index != tables.unk_id]


def _with_rows(params: Params, table: str, first: int, vectors: Tensor) -> Params:
    weight = params[table]["weight"]
    rows = [weight[:first], vectors.to(weight), weight[first + len(vectors) :]]
    return {**params, table: {**params[table], "weight": torch.cat(rows)}}


def _extended_bpe(tables: bpe.Tables, token: str, ids: tuple[int, ...]) -> bpe.Tables:
    added = dict(zip(ids, names(token, len(ids)), strict=True))
    specials = tuple(sorted((*tables.specials, *(Special(text, i, True, False) for i, text in added.items()))))
    multi_token = {**tables.multi_token, **({ids[0]: ids} if len(ids) > 1 else {})}
    token_names = {**tables.names, **added}
    return replace(tables, specials=specials, names=token_names, cuts=cuts_of(specials), multi_token=multi_token)


def _extended_unigram(tables: unigram.Tables, token: str, ids: tuple[int, ...]) -> unigram.Tables:
    new = (unigram.AddedToken(i, text) for i, text in zip(ids, names(token, len(ids)), strict=True))
    added = (*tables.added, *new)
    multi_token = {**tables.multi_token, **({ids[0]: ids} if len(ids) > 1 else {})}
    return replace(tables, added=added, added_pattern=pattern_of(added), multi_token=multi_token)


def _with(record: Any, name: str, value: Any) -> Any:
    """A frozen dataclass or a NamedTuple with one field replaced."""
    return record._replace(**{name: value}) if hasattr(record, "_replace") else replace(record, **{name: value})


_EXTEND: dict[str, Callable[..., Any]] = {"clip_l": _extended_bpe, "clip_g": _extended_bpe, "t5": _extended_unigram}
_TABLE = {"clip_l": "token_embedding", "clip_g": "token_embedding", "t5": "embedding"}
