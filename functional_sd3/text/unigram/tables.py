"""Tables of a unigram tokenizer: its pieces and the look-ups computed from them when it is read."""

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from functional_sd3.formats.printable import shorten
from functional_sd3.text.token_fields import MAX_ADDED, MAX_PIECES
from functional_sd3.text.unigram.charsmap import Charsmap, ascii_map, parse

SPACE = "\u2581"
# The Unicode property White_Space, which `str.isspace` is not.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
UNBOUNDED = int(1e30)  # how transformers writes a tokenizer without a longest length
_UNKNOWN_PENALTY = 10.0
MAX_PIECE_LENGTH = 128
"""Characters of a piece; sentencepiece trains none above 16. Time and memory of the search grow with the longest."""
_MAX_PREFIXES = 2**25
"""Sum of the squared lengths of all pieces, twice the characters that the trie holds; T5's is 1.7 million."""
_HIGHEST_SCORE = 1e30
"""Sums of a million scores of this size are finite in float32."""


class AddedToken(NamedTuple):
    """A token matched in the raw text before normalisation; lstrip, rstrip: the white space on that side belongs to
    it."""

    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False


class Spacing(NamedTuple):
    """Treatment of spaces around the character map; the defaults are those of T5's released file.

    strip drops them at the end, collapse replaces runs by one, split drops white space of every kind between words
    (which is what transformers 5 does with any T5 tokenizer).
    """

    strip: bool = True
    collapse: bool = True
    split: bool = False


T5_SPACING = Spacing()


class Lattice(NamedTuple):
    """Edges of the segmentation graph: `scores` and `ids` of pieces, and the score of one unknown character.

    `scores` is a trie too: a proper prefix of a piece that is no piece has the score -inf. `float32` keeps the sums
    along a path in float32 as sentencepiece does, otherwise in float64 as `tokenizers` does.
    """

    scores: Mapping[str, float]
    ids: Mapping[str, int]
    unknown: float
    float32: bool = False


@dataclass(frozen=True)
class Tables:
    """A unigram tokenizer. Immutable: the mappings in it are never written after `build`.

    pieces and scores are indexed by id; charsmap is the precompiled blob, empty for none. `eos_id` ends every encoded
    text, `pad_id` fills it up. Two tables are equal when these are; what is below `model_max_length` derives from them.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...] = field(repr=False)
    charsmap: bytes = field(repr=False)
    added: tuple[AddedToken, ...] = field(repr=False)
    spacing: Spacing
    unk_id: int
    eos_id: int
    pad_id: int
    model_max_length: int

    full_lattice: Lattice = field(repr=False, compare=False)  # all pieces, special ones too
    ordinary_lattice: Lattice = field(repr=False, compare=False)  # without special pieces
    float32_lattice: Lattice = field(repr=False, compare=False)  # without special pieces, in float32
    # Ids of the words that are their own best segmentation, without their leading space.
    whole_word_ids: Mapping[str, int] = field(repr=False, compare=False)
    characters: Charsmap | None = field(repr=False, compare=False)
    ascii: Mapping[int, str] | None = field(repr=False, compare=False)  # see charsmap.ascii_map
    added_pattern: re.Pattern[str] | None = field(repr=False, compare=False)
    # First id of each added token that is replaced by several, with all of its ids.
    multi_token: Mapping[int, tuple[int, ...]] = field(repr=False, default_factory=dict)

    def __repr__(self) -> str:
        return f"unigram.Tables({len(self.pieces)} pieces, {len(self.added)} added tokens, max {self.model_max_length})"


def build(
    pieces: Sequence[str],
    scores: Sequence[float],
    *,
    charsmap: bytes = b"",
    added: Iterable[AddedToken] = (),
    spacing: Spacing = T5_SPACING,
    unk_id: int = 2,
    eos_id: int = 1,
    pad_id: int = 0,
    model_max_length: int = UNBOUNDED,
    multi_token: Mapping[int, tuple[int, ...]] | None = None,
) -> Tables:
    """Tables from their parts. Raises ValueError naming all inconsistencies, and for more than is read of any file:
    524,288 pieces, 128 characters of a piece, 8,192 added tokens."""
    added = tuple(added)
    _check(pieces, scores, added, {"unk_id": unk_id, "eos_id": eos_id, "pad_id": pad_id})
    characters = parse(charsmap) if charsmap else None
    ids = {piece: index for index, piece in enumerate(pieces)}
    full = Lattice(_trie(pieces, scores), ids, min(scores) - _UNKNOWN_PENALTY)
    special = {pieces[unk_id], *(token.content for token in added)}
    ordinary = full._replace(
        scores={**full.scores, **dict.fromkeys(special & ids.keys(), -math.inf)},
        ids={piece: index for piece, index in ids.items() if piece not in special},
    )
    return Tables(
        pieces=tuple(pieces),
        scores=tuple(scores),
        charsmap=charsmap,
        added=added,
        spacing=spacing,
        unk_id=unk_id,
        eos_id=eos_id,
        pad_id=pad_id,
        model_max_length=model_max_length,
        full_lattice=full,
        ordinary_lattice=ordinary,
        float32_lattice=_in_float32(ordinary),
        whole_word_ids=_whole_words(ordinary, full),
        characters=characters,
        ascii=ascii_map(characters) if characters else {},
        added_pattern=pattern_of(added),
        multi_token=dict(multi_token or {}),
    )


def pattern_of(added: Iterable[AddedToken]) -> re.Pattern[str] | None:
    """Pattern of typed added tokens, the longest first."""
    contents = sorted((re.escape(token.content) for token in added), key=len, reverse=True)
    return re.compile("|".join(contents)) if contents else None


def from_pieces(
    pieces: Iterable[tuple[str, float]],
    *,
    charsmap: bytes = b"",
    extra_ids: int = 0,
    model_max_length: int = 512,
) -> Tables:
    """A T5 tokenizer of ordinary pieces with their log-probabilities, such as `unigram.train` makes.

    `<pad>`, `</s>` and `<unk>` become ids 0, 1 and 2, the pieces follow, and `extra_ids` sentinels end the vocabulary.
    Scores are rounded to float32, which is what a sentencepiece file holds, so that every reader has the same. All
    kinds of white space between words are dropped, so that every reader splits alike.
    """
    names, scores = zip(*pieces, strict=True)
    names = ("<pad>", "</s>", "<unk>", *names, *(f"<extra_id_{i}>" for i in reversed(range(extra_ids))))
    scores = (0.0, 0.0, 0.0, *array("f", scores), *(0.0 for _ in range(extra_ids)))
    plain = [AddedToken(index, names[index]) for index in range(3)]
    sentinels = [AddedToken(i, names[i], True, True) for i in range(len(names) - extra_ids, len(names))]
    spacing = Spacing(strip=False, collapse=False, split=True)
    return build(
        names, scores, charsmap=charsmap, added=plain + sentinels, spacing=spacing, model_max_length=model_max_length
    )


def _check(pieces: Sequence[str], scores: Sequence[float], added: Sequence[AddedToken], ids: Mapping[str, int]) -> None:
    count = len(pieces)
    problems = [f"{name} {id} is outside the {count} pieces" for name, id in ids.items() if not 0 <= id < count]
    if len(set(pieces)) != count:
        twice = [shorten(piece) for piece, times in Counter(pieces).items() if times > 1]
        problems.append(f"pieces occur twice: {twice[:5]}")
    if "" in pieces:
        problems.append("a piece is empty")
    if len(scores) != count:
        problems.append(f"there are {len(scores)} scores for {count} pieces")
    if unfinite := [score for score in scores if not -_HIGHEST_SCORE <= score <= _HIGHEST_SCORE]:
        problems.append(f"{len(unfinite)} scores are not finite, or beyond {_HIGHEST_SCORE:g}: {unfinite[:5]}")
    problems += _excesses(pieces, added) + _misplaced(pieces, added)
    if problems:
        raise ValueError("; ".join(problems[:10]))


def _excesses(pieces: Sequence[str], added: Sequence[AddedToken]) -> list[str]:
    """Problems of pieces that would take hours or gigabytes, or are no text."""
    if len(pieces) > MAX_PIECES or len(added) > MAX_ADDED:
        limits = f"at most {MAX_PIECES:,} and {MAX_ADDED:,} are read"
        return [f"there are {len(pieces):,} pieces and {len(added):,} added tokens; {limits}"]
    longest = max(pieces, key=len, default="")
    if len(longest) > MAX_PIECE_LENGTH:
        return [f"the piece {shorten(longest)!r} has {len(longest):,} characters; at most {MAX_PIECE_LENGTH} are read"]
    if sum(len(piece) ** 2 for piece in pieces) > _MAX_PREFIXES:
        return [f"the {len(pieces):,} pieces are too long together: their trie would take gigabytes"]
    try:
        "".join(pieces).encode()
        "".join(token.content for token in added).encode()
    except UnicodeEncodeError:
        return ["a piece holds half of a surrogate pair, which is no character"]
    return []


def _misplaced(pieces: Sequence[str], added: Sequence[AddedToken]) -> list[str]:
    """Problems of the ids of added tokens: another token has them."""
    problems, count = [], len(pieces)
    index_of = {piece: index for index, piece in enumerate(pieces)} if added else {}
    owners: dict[int, str] = {}
    seen: set[str] = set()
    for id, content, *_ in added:
        misplaced = id < 0 or (id < count and pieces[id] != content) or index_of.get(content, id) != id
        if misplaced or not content:
            problems.append(f"added token {shorten(content)!r} has id {id}, where another piece stands")
        elif content in seen or owners.setdefault(id, content) != content:
            problems.append(f"added token {shorten(content)!r}, or its id {id}, occurs twice")
        seen.add(content)
    return problems


def _trie(pieces: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    trie = dict(zip(pieces, scores, strict=True))
    for piece in pieces:
        for end in range(len(piece) - 1, 0, -1):
            if piece[:end] in trie:
                break
            trie[piece[:end]] = -math.inf
    return trie


def _in_float32(lattice: Lattice) -> Lattice:
    """The same edges with scores in float32."""
    values = array("f", lattice.scores.values())
    lowest = min((score for score in values if score > -math.inf), default=0.0)
    unknown = array("f", [lowest - _UNKNOWN_PENALTY])[0]
    return Lattice(dict(zip(lattice.scores, values, strict=True)), lattice.ids, unknown, float32=True)


def _whole_words(ordinary: Lattice, full: Lattice) -> dict[str, int]:
    """Words, written without their leading space, that no other segmentation beats, with their ids.

    Most words of most texts are among them, and one lookup replaces the search. Here the search is done for all of them
    at once: in sorted order each word shares with the one before it the best sums of its beginning, and the
    starts from which the beginning could still be continued to a piece. A tie goes to the earliest start, which is the
    whole word.
    """
    whole = {}
    score = full.scores.get
    previous, best = "", [0.0]
    open_starts: list[list[int]] = [[]]
    for word in sorted(piece for piece in ordinary.ids if piece[0] == SPACE and SPACE not in piece[1:]):
        shared = 0
        for one, other in zip(word, previous, strict=False):
            if one != other:
                break
            shared += 1
        del best[shared + 1 :], open_starts[shared + 1 :]
        for end in range(shared + 1, len(word) + 1):
            single = score(word[end - 1], -math.inf)
            highest = best[end - 1] + (single if single > -math.inf else full.unknown)
            still_open = [end - 1]
            for start in open_starts[-1]:
                step = score(word[start:end])
                if step is not None:
                    still_open.append(start)
                    if best[start] + step > highest:
                        highest = best[start] + step
            best.append(highest)
            open_starts.append(still_open)
        if best[-1] == full.scores[word]:
            whole[word[1:]] = ordinary.ids[word]
        previous = word
    return whole
