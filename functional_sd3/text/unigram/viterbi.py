"""Viterbi's algorithm over the lattice of a text: its most probable segmentation into pieces."""

from array import array
from collections.abc import Sequence
from itertools import accumulate
from math import inf

from functional_sd3.text.unigram.tables import Lattice, Tables

_LONG_WORD = 4096


def segment(tables: Tables, lattice: Lattice, text: str, room: int | None = None) -> list[tuple[int, int]]:
    """The best path through the lattice of `text`, as (id, characters); neighbouring unknown characters are one token.

    With `room`, a path whose first `room` ids are those of the best path, computed from the beginning of a long text.
    Among as many consecutive places as the longest piece has characters the best path has a boundary, and up to there
    it is the best path to that place; where the best paths to all of these places begin alike, so does the whole.
    """
    if room is not None:
        longest = max(map(len, tables.pieces)) if len(text) > _LONG_WORD else len(text)
        size = 4 * room + longest
        # Attempts are made while they cost less than the whole.
        while 2 * longest * size < len(text):
            origin = _origins(lattice, text[:size])
            ends = range(size - longest + 1, size + 1)
            paths = [_path(tables, lattice, text, origin, end)[:room] for end in ends]
            first, *others = ([index for index, _ in path] for path in paths)
            if len(first) == room and all(ids == first for ids in others):
                return paths[0]
            size *= 2
    return _path(tables, lattice, text, _origins(lattice, text), len(text))


def _origins(lattice: Lattice, text: str) -> list[int]:
    """Start of the last piece of the best path to each place in `text`.

    Starts are tried from left to right and only a better sum replaces an earlier one, so ties go to the longest last
    piece. Sums that differ in float64 may tie in float32, which is why they are compared as they are kept.
    """
    size = len(text)
    best = array("f", [-inf]) * (size + 1) if lattice.float32 else [-inf] * (size + 1)
    best[0] = 0.0
    origin = [0] * (size + 1)
    score = lattice.scores.get
    for start in range(size):
        here = best[start]
        one = score(text[start], -inf)
        end = start + 1
        total = here + (lattice.unknown if one == -inf else one)
        while True:
            previous = best[end]
            if total > previous:
                best[end] = total
                if best[end] > previous:
                    origin[end] = start
            end += 1
            if end > size:
                break
            step = score(text[start:end])
            if step is None:
                break
            total = here + step
    return origin


def _path(tables: Tables, lattice: Lattice, text: str, origin: Sequence[int], end: int) -> list[tuple[int, int]]:
    """The best path to a place, as `segment` gives it."""
    path: list[tuple[int, int]] = []
    while end:
        start = origin[end]
        index = lattice.ids.get(text[start:end], tables.unk_id)
        if path and index == tables.unk_id == path[-1][0]:
            path[-1] = (index, path[-1][1] + end - start)
        else:
            path.append((index, end - start))
        end = start
    return path[::-1]


def boundaries(path: Sequence[tuple[int, int]]) -> list[int]:
    """Character positions at which the tokens of a path begin and end: (tokens + 1) numbers, the first 0."""
    return [0, *accumulate(length for _, length in path)]
