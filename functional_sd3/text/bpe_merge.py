"""Merging the bytes of one word: byte-pair encoding itself (Sennrich et al. 2016), `</w>` marking the last byte."""

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush

Pairs = Mapping[tuple[int, int], tuple[int, int]]  # (left, right) -> (rank, merged), all of them ids

END_OF_WORD = "</w>"
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
# Every byte as one visible character, in CLIP's order of ids: printable bytes as themselves, the others from U+0100 on.
BYTE_SYMBOLS = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)}
BYTES = {symbol: byte for byte, symbol in BYTE_SYMBOLS.items()}


def merge(pairs: Pairs, symbols: list[int]) -> list[int]:
    """Joins the neighbours of lowest rank, leftmost first, until none are left that the merges know.

    n log n in the number of symbols: a prompt may be one word of ten thousand letters.
    """
    count = len(symbols)
    neighbours = enumerate(zip(symbols, symbols[1:], strict=False))
    queue = [(*pairs[pair], left, left + 1) for left, pair in neighbours if pair in pairs]
    heapify(queue)
    alive: list[int | None] = [*symbols]
    following, preceding = list(range(1, count + 1)), list(range(-1, count - 1))
    while queue:
        rank, merged, left, right = heappop(queue)
        first, second = alive[left], alive[right]
        # an entry is stale once one of the two has been joined to something else
        if first is None or second is None or following[left] != right or pairs.get((first, second)) != (rank, merged):
            continue
        alive[left], alive[right] = merged, None
        after = following[left] = following[right]
        if after < count:
            preceding[after] = left
            known = pairs.get((merged, alive[after]))
            if known is not None:
                heappush(queue, (*known, left, after))
        before = preceding[left]
        if before >= 0:
            known = pairs.get((alive[before], merged))
            if known is not None:
                heappush(queue, (*known, before, left))
    return [symbol for symbol in alive if symbol is not None]


def symbols_of(encoded: bytes, inner: Sequence[int], final: Sequence[int]) -> list[int]:
    """The ids that a word's bytes start from."""
    return [*[inner[byte] for byte in encoded[:-1]], final[encoded[-1]]]


def whole_words(
    vocab: Mapping[str, int], pairs: Pairs, inner: Sequence[int], final: Sequence[int]
) -> dict[str, int]:
    """The words whose merges end in one token: most of what people write, found again with one look-up."""
    found = {}
    for token, i in vocab.items():
        if not token.endswith(END_OF_WORD):
            continue
        try:
            encoded = bytes([BYTES[symbol] for symbol in token[: -len(END_OF_WORD)]])
            word = encoded.decode()
        except (KeyError, UnicodeDecodeError):  # not spelt in bytes, or part of a character: no text is this word
            continue
        # merged rather than assumed: the merges may lead elsewhere and never reach a token of the vocabulary
        if encoded and merge(pairs, symbols_of(encoded, inner, final)) == [i]:
            found[word] = i
    return found
