"""Byte-pair merges of one word (Sennrich et al. 2016), with `</w>` after the last byte."""

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

END_OF_WORD = "</w>"
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
# Every byte as one visible character, in CLIP's order of ids: printable bytes as themselves, the others from U+0100 on.
BYTE_SYMBOLS = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)}
BYTES = {symbol: byte for byte, symbol in BYTE_SYMBOLS.items()}
_REMOVED = -1


class Merges(NamedTuple):
    """Merges of ids: the rank of each pair, the id that each rank's pair becomes, and the bytes of the longest
    token."""

    ranks: Mapping[tuple[int, int], int]
    merged: Sequence[int]
    longest: int


def merge(merges: Merges, symbols: Sequence[int]) -> list[int]:
    """Joins the neighbours of lowest rank, leftmost first, until no merge applies.

    n log n in the number of symbols: a prompt may be one word of ten thousand letters.
    """
    rank_of, merged = merges.ranks.get, merges.merged
    current, count = list(symbols), len(symbols)
    neighbours = enumerate(zip(current, current[1:], strict=False))
    queue = [(rank, left) for left, pair in neighbours if (rank := rank_of(pair)) is not None]
    heapify(queue)
    following, preceding = list(range(1, count + 1)), list(range(-1, count - 1))
    while queue:
        rank, left = heappop(queue)
        right = following[left]
        # an entry is stale once one of the two has been joined to something else
        if right == count or rank_of((current[left], current[right])) != rank:
            continue
        current[left], current[right] = merged[rank], _REMOVED
        following[left] = after = following[right]
        if after < count:
            preceding[after] = left
            if (rank := rank_of((current[left], current[after]))) is not None:
                heappush(queue, (rank, left))
        if (before := preceding[left]) >= 0 and (rank := rank_of((current[before], current[left]))) is not None:
            heappush(queue, (rank, before))
    return [symbol for symbol in current if symbol != _REMOVED]


def merge_first(merges: Merges, symbols: Sequence[int], count: int) -> list[int]:
    """The first `count` ids of `merge(merges, symbols)`, computed from the beginning of `symbols` where that is long.

    Merges on the two sides of a boundary between two tokens of the result are independent, so the tokens before it are
    those of the symbols before it alone. Among `merges.longest` places in a row one is such a boundary.
    Where the beginnings that end at each of them have the same first tokens, the whole has them too.
    """
    size = 4 * count + merges.longest
    # Attempts are made while they cost less than merging the whole.
    while merges.longest * size < len(symbols):
        ends = range(size - merges.longest + 1, size + 1)
        first = merge(merges, symbols[:size])[:count]
        if len(first) == count and all(merge(merges, symbols[:end])[:count] == first for end in ends):
            return first
        size *= 2
    return merge(merges, symbols)[:count]


def symbols_of(encoded: bytes, inner: Sequence[int], final: Sequence[int]) -> list[int]:
    """The ids of a word's bytes, before any merge."""
    return [*[inner[byte] for byte in encoded[:-1]], final[encoded[-1]]]


def whole_words(vocab: Mapping[str, int], merges: Merges, inner: Sequence[int], final: Sequence[int]) -> dict[str, int]:
    """Words that merge into one token, with their ids: most words of prompts, in one look-up."""
    ids = {}
    for token, i in vocab.items():
        if not token.endswith(END_OF_WORD):
            continue
        try:
            encoded = bytes([BYTES[symbol] for symbol in token[: -len(END_OF_WORD)]])
            word = encoded.decode()
        except (KeyError, UnicodeDecodeError):  # not spelt in bytes, or part of a character: no text is this word
            continue
        # merged rather than assumed: the merges may lead elsewhere and never reach a token of the vocabulary
        if encoded and merge(merges, symbols_of(encoded, inner, final)) == [i]:
            ids[word] = i
    return ids
