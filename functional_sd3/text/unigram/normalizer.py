"""Normalization before unigram segmentation: characters rewritten, spaces made visible.

The two libraries that read T5's files differ most in this step: see `words` (Hugging Face) and `sentence`
(sentencepiece).
"""

import re
from collections.abc import Iterable, Iterator

from functional_sd3.text.unigram import charsmap
from functional_sd3.text.unigram.graphemes import clusters
from functional_sd3.text.unigram.tables import SPACE, WHITE_SPACE, Tables

Span = tuple[int, int]


def words(tables: Tables, text: str, split: bool) -> list[str]:
    """Words of the normalised text, without the space symbol that each begins with."""
    if text.isascii() and tables.ascii is not None and "\r\n" not in text:
        text = text.translate(tables.ascii)
    else:
        text = "".join(new for _, new in _by_cluster(tables, text))
    if split:
        return [word for run in _WHITE_RUN.split(text) if run for word in _split(run)]
    if tables.spacing.strip:
        text = text.rstrip(WHITE_SPACE)
    if tables.spacing.collapse and "  " in text:
        text = _SPACES.sub(SPACE, text)
    return _split(text) if text else []


def _split(text: str) -> list[str]:
    text = text.replace(" ", SPACE)
    return text[text.startswith(SPACE) :].split(SPACE)


def _by_cluster(tables: Tables, text: str) -> Iterator[tuple[str, str]]:
    """Substrings of the text with their replacements, in order, by the rules of Hugging Face's `Precompiled`.

    A grapheme cluster of fewer than six bytes becomes the replacement of its first spelling, whatever else it holds (so
    a no-break space loses its accents); longer clusters, and those without a spelling, are rewritten character by
    character.
    """
    if tables.characters is None:
        yield from zip(text, text, strict=True)
        return
    known: dict[str, str] = {}
    for cluster in clusters(text):
        if len(cluster) > 1 and len(cluster.encode()) < 6:
            new = charsmap.shortest(tables.characters, cluster)
            if new is not None:
                yield cluster, new
                continue
        for character in cluster:
            if character not in known:
                new = charsmap.shortest(tables.characters, character)
                known[character] = character if new is None else new
            yield character, known[character]


def _by_longest(tables: Tables, text: str) -> Iterator[tuple[str, str]]:
    """Substrings of the text with their replacements, in order, by the rules of sentencepiece."""
    if tables.characters is None:
        yield from zip(text, text, strict=True)
        return
    data, place, position = text.encode(), 0, 0
    while place < len(text):
        match = charsmap.longest(tables.characters, data, position)
        if match is None:
            old = new = text[place]
            position += len(old.encode())
        else:
            old, new = data[position : match[0]].decode(), match[1]
            position = match[0]
        yield old, new
        place += len(old)


def sentence(tables: Tables, text: str) -> tuple[str, list[int]]:
    """The text that sentencepiece segments, and the index in `text` of each of its characters and of its end."""
    characters: list[str] = []
    origins: list[int] = []
    place, after_space = 0, True
    for old, new in _by_longest(tables, text):
        if not characters and new != " ":
            characters, origins = [SPACE], [place]
        new = new.lstrip(" ") if after_space else new
        characters += new.replace(" ", SPACE)
        origins += [place] * len(new)
        place += len(old)
        after_space = new.endswith(" ") if new else after_space
    while characters and characters[-1] == SPACE:
        characters.pop()
        place = origins.pop()
    return "".join(characters), [*origins, place]


def aligned_words(tables: Tables, text: str, split: bool) -> list[list[tuple[str, Span]]]:
    """`words`, each with its space symbol and each character with the span of the text it comes from."""
    characters = _aligned(_by_cluster(tables, text))
    runs = [characters]
    if split:
        runs = _runs(characters, WHITE_SPACE, keep=False)
    else:
        while tables.spacing.strip and characters and characters[-1][0] in WHITE_SPACE:
            characters.pop()
        if tables.spacing.collapse:
            runs = [_collapsed(characters)]
    words = []
    for run in filter(None, runs):
        run = [(SPACE if character == " " else character, span) for character, span in run]
        words += _runs(run if run[0][0] == SPACE else [(SPACE, run[0][1]), *run], SPACE, keep=True)
    return words


def _aligned(rewrites: Iterable[tuple[str, str]]) -> list[tuple[str, Span]]:
    """Rewritten characters with their spans, by the book-keeping of `tokenizers`' `NormalizedString`.

    Each new character has a change: 0 replaces one old character, 1 is inserted after the one before, -n also removes
    the next n. Characters removed at the very start are recorded nowhere, so all later spans are off by their number.
    """
    changes: list[list] = []
    for old, new in rewrites:
        growth = len(new) - len(old)
        changes += [[character, 0] for character in new]
        for inserted in changes[len(changes) - growth :] if growth > 0 else ():
            inserted[1] = 1
        if growth < 0 and changes:
            changes[-1][1] += growth
    aligned, place = [], 0
    for character, change in changes:
        if change > 0:
            span = (place - 1, place) if place else (0, 0)
        else:
            span = (place, place + 1)
            place += 1 - change
        aligned.append((character, span))
    return aligned


def _collapsed(characters: list[tuple[str, Span]]) -> list[tuple[str, Span]]:
    """Runs of spaces become one space symbol, placed where the last of them was."""
    out: list[tuple[str, Span]] = []
    for character, span in characters:
        if character == " " and out and out[-1][0] in (" ", _SPACE_RUN):
            out[-1] = (_SPACE_RUN, span)
        else:
            out.append((character, span))
    return [(SPACE if character == _SPACE_RUN else character, span) for character, span in out]


def _runs(characters: list[tuple[str, Span]], at: str, *, keep: bool) -> list[list[tuple[str, Span]]]:
    """Cut before every character in `at`, which begins the next run if it is kept."""
    runs: list[list[tuple[str, Span]]] = [[]]
    for item in characters:
        if item[0] in at:
            runs.append([item] if keep else [])
        else:
            runs[-1].append(item)
    return [run for run in runs if run]


_SPACE_RUN = "  "
_SPACES = re.compile(" {2,}")
_WHITE_RUN = re.compile(f"[{WHITE_SPACE}]+")
