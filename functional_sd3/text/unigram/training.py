"""Training a unigram vocabulary from texts, deterministically.

Kudo 2018, "Subword Regularization", section 3.2: start from every frequent substring of every word and alternate

    E   expected count of each piece, over all segmentations of all words (forward-backward),
    M   log p(piece) = digamma(count) - digamma(sum of counts)   (variational Bayes, favours few pieces),

dropping after every round the pieces whose loss would lower the likelihood of the texts least, until `size` are
left. Single characters are never dropped. Written for small closed worlds (hundreds of distinct words).
"""

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import torch

from functional_sd3.text.unigram.charsmap import build
from functional_sd3.text.unigram.encoding import normalize
from functional_sd3.text.unigram.tables import SPACE, WHITE_SPACE, from_pieces

_MAX_PIECE = 16  # characters of a piece, as in T5
_ROUNDS = 2  # of EM between prunings
_KEPT = 0.75  # share of the pieces that each pruning keeps
_SLACK = 1.1  # of `size`: pruning stops there; then the least probable pieces are dropped
_MIN_COUNT = 0.5  # expected count below which a piece is dropped, and the smallest count of a character


def train(texts: Iterable[str], size: int, *, charsmap: bytes = b"") -> list[tuple[str, float]]:
    """At most `size` pieces with their log-probabilities (float32 values), most probable first.

    `texts` are rewritten with the precompiled `charsmap` first (see `plain_charsmap`). The pieces do not include
    padding, end and unknown: `unigram.from_pieces` puts them in front. There are fewer than `size` when no others
    increase the likelihood. Raises ValueError when `texts` hold no words, or more distinct characters than `size`.
    """
    blank = from_pieces([(SPACE, -1.0)], charsmap=charsmap)
    words = Counter(SPACE + word for text in texts for word in normalize(blank, text).split(" ") if word)
    characters = {character for word in words for character in word}
    if not words:
        raise ValueError("texts hold no words to train on")
    if size < len(characters):
        raise ValueError(f"size is {size}; the texts hold {len(characters)} distinct characters, which is the least")
    scores = _seeds(words, characters, 10 * size)
    while True:
        for _ in range(_ROUNDS):
            scores = _maximized(_expected(words, scores), characters)
        if len(scores) <= _SLACK * size:
            break
        scores = _pruned(words, scores, characters, max(int(_SLACK * size), int(_KEPT * len(scores))))
    ranked = sorted(scores, key=lambda piece: (piece not in characters, -scores[piece], piece))[:size]
    rounded = array("f", [scores[piece] for piece in ranked])
    return sorted(zip(ranked, rounded, strict=True), key=lambda pair: (-pair[1], pair[0]))


def plain_charsmap() -> bytes:
    """A small character map for prompts in lower case: one kind of space, no control characters, a to z for A to Z."""
    spaces = dict.fromkeys(WHITE_SPACE, " ")
    controls = {chr(code): "" for code in (*range(1, 32), *range(127, 160))}
    capitals = {chr(code): chr(code).lower() for code in range(ord("A"), ord("Z") + 1)}
    return build({**controls, **spaces, SPACE: " ", **capitals})


def _seeds(words: Mapping[str, int], characters: set[str], most: int) -> dict[str, float]:
    """Substrings that occur at least twice, those that cover most text first, with probabilities in that proportion."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(start + _MAX_PIECE, len(word)) + 1):
                counts[word[start:end]] += count
    covered = {piece: count * len(piece) for piece, count in counts.items() if count > 1 or piece in characters}
    ranked = sorted(covered, key=lambda piece: (piece not in characters, -covered[piece], piece))[:most]
    total = sum(covered[piece] for piece in ranked)
    return {piece: math.log(covered[piece] / total) for piece in ranked}


def _expected(words: Mapping[str, int], scores: Mapping[str, float]) -> dict[str, float]:
    """Expected count of each piece over the segmentations of all words, by forward-backward."""
    expected: dict[str, float] = defaultdict(float)
    for word, count in sorted(words.items()):
        edges = _edges(word, scores)
        forward = [0.0] + [-math.inf] * len(word)
        for start, end, score in edges:
            forward[end] = _log_add(forward[end], forward[start] + score)
        backward = [-math.inf] * len(word) + [0.0]
        for start, end, score in reversed(edges):
            backward[start] = _log_add(backward[start], score + backward[end])
        for start, end, score in edges:
            expected[word[start:end]] += count * math.exp(forward[start] + score + backward[end] - forward[-1])
    return expected


def _maximized(expected: Mapping[str, float], characters: set[str]) -> dict[str, float]:
    counts = {
        piece: max(count, _MIN_COUNT) for piece, count in expected.items() if count >= _MIN_COUNT or piece in characters
    }
    values = torch.tensor([*counts.values(), sum(counts.values())], dtype=torch.float64, device="cpu")
    *scores, total = torch.special.digamma(values).tolist()
    return {piece: score - total for piece, score in zip(counts, scores, strict=True)}


def _pruned(words: Mapping[str, int], scores: Mapping[str, float], characters: set[str], kept: int) -> dict[str, float]:
    """The `kept` pieces whose removal would lower the likelihood of the best segmentations most."""
    used: Counter[str] = Counter()
    for word, count in sorted(words.items()):
        for piece in _best(word, scores)[1]:
            used[piece] += count

    def loss(piece: str) -> float:
        others = {other: score for other, score in scores.items() if other != piece}
        return used[piece] * (scores[piece] - _best(piece, others)[0]) if used[piece] else 0.0

    losses = {piece: math.inf if piece in characters else loss(piece) for piece in scores}
    ranked = sorted(scores, key=lambda piece: (-losses[piece], -scores[piece], piece))[:kept]
    return {piece: scores[piece] for piece in ranked}


def _best(text: str, scores: Mapping[str, float]) -> tuple[float, list[str]]:
    """The most probable segmentation and its log-probability."""
    best: list[tuple[float, int]] = [(0.0, 0)] + [(-math.inf, 0)] * len(text)
    for start, end, score in _edges(text, scores):
        if best[start][0] + score > best[end][0]:
            best[end] = (best[start][0] + score, start)
    path, end = [], len(text)
    while end:
        path.append(text[best[end][1] : end])
        end = best[end][1]
    return best[-1][0], path[::-1]


def _edges(text: str, scores: Mapping[str, float]) -> list[tuple[int, int, float]]:
    return [
        (start, end, scores[text[start:end]])
        for start in range(len(text))
        for end in range(start + 1, min(start + _MAX_PIECE, len(text)) + 1)
        if text[start:end] in scores
    ]


def _log_add(one: float, other: float) -> float:
    high, low = max(one, other), min(one, other)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
