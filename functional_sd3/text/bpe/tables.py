"""Tables of CLIP's byte-pair tokenizer: read from its files, checked, and written again."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from functional_sd3.text.bpe import files
from functional_sd3.text.bpe.check import Special
from functional_sd3.text.bpe.merge import BYTE_SYMBOLS, END_OF_WORD, Merges, whole_words
from functional_sd3.text.bpe.words import WORDS, WORDS_AND_LITERALS, normalize


@dataclass(frozen=True, slots=True)
class Tables:
    """A tokenizer: everything `apply` needs, computed once, never written to."""

    vocab: Mapping[str, int]
    merges: Merges
    whole_word_ids: Mapping[str, int]  # words that are one token
    inner: tuple[int, ...]  # id of each byte inside a word
    final: tuple[int, ...]  # id of each byte at the end of a word
    names: Mapping[int, str]
    specials: tuple[Special, ...]
    cuts: "Cuts"
    pattern: re.Pattern[str]
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int
    model_max_length: int
    multi_token: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # first id -> every id of such a token

    def __repr__(self) -> str:
        return f"bpe.Tables({len(self.vocab)} tokens, {len(self.specials)} special, max {self.model_max_length})"


class Cuts(NamedTuple):
    """Patterns of special tokens: first those matched in the raw text, then those matched in the normalised
    remainder."""

    raw: re.Pattern[str] | None
    normalized: re.Pattern[str] | None
    ids: Mapping[str, int]


def init(
    source: Any, merges: Any = None, *, pad_token: str | None = None, model_max_length: int | None = None
) -> Tables:
    """Tables of a tokenizer.

    source: a folder (vocab.json and merges.txt, or a tokenizer.json, with the configs beside them), the path of a
    tokenizer.json, or a (vocab, merges) pair, each given as a path or as the dict and the list themselves;
    `init(vocab, merges)` is the same. `pad_token` and `model_max_length` override those of the files; the
    defaults are the end token and 77. Raises one ValueError naming every problem in the files.
    """
    contents = files.read(
        source if merges is None else (source, merges), pad_token=pad_token, model_max_length=model_max_length
    )
    vocab, ids = contents.vocab, {special.content: special.id for special in contents.specials}
    unk = ids[contents.names["unk_token"]]
    merge_ids = Merges(
        ranks={(vocab[left], vocab[right]): rank for rank, (left, right) in enumerate(contents.merges)},
        merged=[vocab[left + right] for left, right in contents.merges],
        longest=max((len((left + right).removesuffix(END_OF_WORD)) for left, right in contents.merges), default=1),
    )
    inner = tuple(vocab.get(BYTE_SYMBOLS[byte], unk) for byte in range(256))
    final = tuple(vocab.get(BYTE_SYMBOLS[byte] + END_OF_WORD, unk) for byte in range(256))
    return Tables(
        vocab=vocab,
        merges=merge_ids,
        whole_word_ids=whole_words(vocab, merge_ids, inner, final),
        inner=inner,
        final=final,
        names={i: token for token, i in vocab.items()} | {i: content for content, i in ids.items()},
        specials=contents.specials,
        cuts=cuts_of(contents.specials, True),
        pattern=WORDS_AND_LITERALS if contents.keeps_literals else WORDS,
        bos_id=ids[contents.names["bos_token"]],
        eos_id=ids[contents.names["eos_token"]],
        unk_id=unk,
        pad_id=ids[contents.names["pad_token"]],
        model_max_length=contents.model_max_length,
        multi_token={ids[names[0]]: tuple(ids[name] for name in names) for names in contents.multi_token},
    )


def cuts_of(specials: Sequence[Special], chosen: bool | Collection[str] = True) -> Cuts:
    """Patterns of some special tokens: all, only those not flagged special (False), or those named."""
    if isinstance(chosen, str):
        raise ValueError(f"special_tokens is the string {chosen!r}; True, False or a collection of strings is right")
    known = {special.content for special in specials}
    unknown = [] if isinstance(chosen, bool) else sorted(set(chosen) - known)
    if unknown:
        raise ValueError(f"special_tokens {unknown} are not among those of this tokenizer, {sorted(known)}")
    matched = [s for s in specials if chosen is True or not s.special or (chosen and s.content in chosen)]
    raw = {special.content: special.id for special in matched if not special.normalized}
    normalized = {normalize(special.content): special.id for special in matched if special.normalized}
    return Cuts(_any_of(raw), _any_of(normalized), raw | normalized)


def _any_of(contents: Collection[str]) -> re.Pattern[str] | None:
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if contents else None


def save(folder: str | os.PathLike[str], tables: Tables) -> None:
    """Writes vocab.json, merges.txt and the two configs into `folder`, as `init` and `CLIPTokenizer` load them."""
    by_rank = sorted(tables.merges.ranks, key=tables.merges.ranks.__getitem__)
    ids = {"bos": tables.bos_id, "eos": tables.eos_id, "unk": tables.unk_id, "pad": tables.pad_id}
    contents = files.Files(
        vocab=dict(tables.vocab),
        merges=[(tables.names[left], tables.names[right]) for left, right in by_rank],
        specials=tables.specials,
        names={f"{name}_token": tables.names[i] for name, i in ids.items()},
        model_max_length=tables.model_max_length,
        keeps_literals=tables.pattern == WORDS_AND_LITERALS,
        multi_token=tuple(tuple(tables.names[i] for i in ids) for ids in tables.multi_token.values()),
    )
    files.write(folder, contents)
