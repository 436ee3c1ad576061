"""Learning a byte-pair vocabulary in CLIP's format from a corpus (Sennrich et al. 2016, algorithm 1)."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from functional_sd3.text.bpe.check import BOS, EOS
from functional_sd3.text.bpe.merge import BYTE_SYMBOLS, END_OF_WORD
from functional_sd3.text.bpe.words import WORDS, normalize, words

_FIXED = 2 * len(BYTE_SYMBOLS) + 2


def train(
    texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocab, merges) for `bpe.init`, with at most `vocab_size` entries.

    The vocabulary is laid out as CLIP's: the 256 bytes, the 256 bytes that end a word, one entry for each merge, then
    the start and the end token. A merge joins the most frequent pair of neighbours, the first in alphabetical order
    among equals; learning ends early once no pair occurs `min_frequency` times. The same corpus, in any order, gives
    the same result. Raises ValueError for a `vocab_size` below 514, which the bytes and the two special tokens need.
    """
    if vocab_size < _FIXED:
        raise ValueError(f"vocab_size {vocab_size} is too small; bytes and special tokens alone are {_FIXED}")
    counts = Counter(word for text in texts for word in words(WORDS, normalize(text)))
    merges = _learn(counts, vocab_size - _FIXED, min_frequency)
    symbols = list(BYTE_SYMBOLS.values())
    joined = [left + right for left, right in merges]
    tokens = dict.fromkeys([*symbols, *(symbol + END_OF_WORD for symbol in symbols), *joined, BOS, EOS])
    return {token: i for i, token in enumerate(tokens)}, merges


def _learn(counts: Counter[str], limit: int, min_frequency: int) -> list[tuple[str, str]]:
    spelt = {word: _spell(word) for word in counts}
    frequency: Counter[tuple[str, str]] = Counter()
    holders: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for word, symbols in spelt.items():
        for pair in zip(symbols, symbols[1:], strict=False):
            frequency[pair] += counts[word]
            holders[pair].add(word)
    merges: list[tuple[str, str]] = []
    tokens: set[str] = set()  # fewer than the merges, where two of them spell the same token
    while len(tokens) < limit and frequency:
        best = min(frequency, key=lambda pair: (-frequency[pair], pair))
        if frequency[best] < min_frequency:
            break
        merges.append(best)
        tokens.add(best[0] + best[1])
        for word in holders.pop(best):
            before, after = spelt[word], _join(spelt[word], best)
            for pair in zip(before, before[1:], strict=False):
                frequency[pair] -= counts[word]
            for pair in zip(after, after[1:], strict=False):
                frequency[pair] += counts[word]
                holders[pair].add(word)
            spelt[word] = after
        del frequency[best]
    return merges


def _spell(word: str) -> list[str]:
    symbols = [BYTE_SYMBOLS[byte] for byte in word.encode()]
    return [*symbols[:-1], symbols[-1] + END_OF_WORD]


def _join(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for symbol in symbols:
        # a joined symbol is longer than either half, so it is never a half again: "aaa" becomes "aa" + "a"
        if joined and (joined[-1], symbol) == pair:
            joined[-1] = pair[0] + pair[1]
        else:
            joined.append(symbol)
    return joined
