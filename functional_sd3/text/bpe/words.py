"""Pre-tokenization of CLIP: Unicode NFC, lower case, then words, digits and runs of other characters.

The behaviour is that of Hugging Face's `tokenizers` (the only backend `CLIPTokenizer` has in transformers 5):
NFC by the tables of Unicode 9, lower-casing character by character, and the splitting pattern of OpenAI's CLIP.
"""

import re
import unicodedata
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

# The pattern of OpenAI's CLIP, over the *shape* of a text (see `_shape`), where every letter outside ASCII reads "a".
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+"
WORDS = re.compile(_WORDS, re.ASCII)
# transformers 5 keeps two literals whole here. As special tokens they have been cut out before; those that remain
# (typed in capitals, or not to be recognised) are split by WORDS afterwards, but never joined to the punctuation that
# follows.
WORDS_AND_LITERALS = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|" + _WORDS, re.ASCII)

# Characters younger than Unicode 9 that combine, compose or decompose. The reference's NFC does not know them, so they
# neither move nor join; listed here, they behave alike under every version of Python.
_YOUNGER_THAN_UNICODE_9 = re.compile(
    "([\u05c8-\u05c9\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b-\u0d3c\u0eba\u1715\u1abf-\u1af0\u1df6-\u1dfa"
    "\ua82c\U000105c0-\U000105ff\U00010d24-\U00010d27\U00010d69-\U00010d6d\U00010eab-\U00010eac\U00010ecb-\U00010ecf"
    "\U00010ef0-\U00010eff\U00010f46-\U00010f50\U00010f82-\U00010f85\U00011070\U0001133b\U00011380-\U000113ff"
    "\U0001145e\U00011839-\U0001183a\U00011930\U00011935\U00011938\U0001193d-\U0001193e\U00011943\U000119e0\U00011a34"
    "\U00011a47\U00011a99\U00011d42\U00011d44-\U00011d45\U00011d97\U00011f41-\U00011f42\U00016100-\U0001613f"
    "\U00016d40-\U00016d7f\U00016ff0-\U00016ff1\U0001d127-\U0001d128\U0001d250-\U0001d252\U0001d25b-\U0001d25c"
    "\U0001d25f\U0001d280-\U0001d281\U0001e08f\U0001e130-\U0001e136\U0001e2ae\U0001e2ec-\U0001e2ef\U0001e4ec-\U0001e4ef"
    "\U0001e5ee-\U0001e5ef\U0001e6e3\U0001e6e6\U0001e6ee-\U0001e6ef\U0001e6f5])"
)


class Aligned(NamedTuple):
    """A normalised text, and for each of its characters the index of the character it came from."""

    text: str
    sources: Sequence[int]


def normalize(text: str) -> str:
    """`text` in NFC and lower case. Spaces are left alone: they only separate words."""
    if text.isascii():
        return text.lower()
    if _has_long_run(text):
        return normalize_aligned(text).text
    # parts of a text in NFC are in NFC, so checking the whole first is fast and exact
    parts = [text] if unicodedata.is_normalized("NFC", text) else _YOUNGER_THAN_UNICODE_9.split(text)
    composed = "".join(unicodedata.normalize("NFC", part) for part in parts)
    # str.lower() depends on the neighbours of a capital sigma and writes ς at the end of a word.
    return composed.replace("Σ", "σ").lower()


def _has_long_run(text: str) -> bool:
    """True if so many combining characters follow one another that `unicodedata`, which sorts them by insertion, would
    take long; three characters that decompose to combining ones count too."""
    if len(text) < _LONG_RUN:
        return False
    combining = map(unicodedata.combining, text.translate(_DECOMPOSING_TO_MARKS))
    return bytes(map(bool, combining)).find(b"\1" * _LONG_RUN) >= 0


_LONG_RUN = 256
_DECOMPOSING_TO_MARKS = dict.fromkeys(map(ord, "\u0f73\u0f75\u0f81"), "\u0f71")


def words(pattern: re.Pattern[str], text: str, most: int | None = None) -> list[str]:
    """The words of a normalised text, in order, or the first `most` of them; whitespace is dropped."""
    if text.isascii():
        return pattern.findall(text)[:most]
    return [text[start:end] for start, end in spans(pattern, text, most)]


def spans(pattern: re.Pattern[str], text: str, most: int | None = None) -> list[tuple[int, int]]:
    """Spans (start, end) of the words of a normalised text, or of the first `most` of them."""
    return [word.span() for word in islice(pattern.finditer(_shape(text)), most)]


def _shape(text: str) -> str:
    """`text` with every character outside ASCII replaced by an ASCII one of the same class, position by position.

    The standard `re` has no `\\p{L}` and `\\p{N}`; Python's `\\w` and `\\d` are other sets.
    """
    if text.isascii():
        return text
    stand_ins = _StandIns()
    return _NOT_ASCII.sub(lambda run: "".join(map(stand_ins.__getitem__, run[0])), text)


class _StandIns(dict):
    """ASCII stand-ins of characters outside ASCII, looked up once each."""

    def __missing__(self, character: str) -> str:
        # U+0085 is the only member of White_Space outside ASCII and category Z.
        category = "Z" if character == "\x85" else unicodedata.category(character)[0]
        self[character] = stand_in = _STAND_INS.get(category, "!")
        return stand_in


_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_STAND_INS = {"L": "a", "N": "0", "Z": " "}


def normalize_aligned(text: str) -> Aligned:
    """`normalize(text)` with the index in `text` that each character came from.

    As in the reference, a composed character points at its first part, and characters that a decomposition inserts
    point where their predecessor does.
    """
    if text.isascii():
        return Aligned(text.lower(), range(len(text)))
    lowered, sources, position = [], [], 0
    for part in _YOUNGER_THAN_UNICODE_9.split(text):
        end = position + len(part)
        for character, change in _compose(_decompose(part)):
            if change <= 0:
                source, position = position, position + 1 - change
            else:
                source = position - 1
            for lower in character.lower():
                lowered.append(lower)
                sources.append(source)
        position = end
    return Aligned("".join(lowered), sources)


def _decompose(text: str) -> list[tuple[str, int]]:
    """Canonical decomposition in canonical order; each character with 1 if it lengthens the text, else 0."""
    ordered: list[tuple[str, int]] = []
    marks: list[tuple[str, int]] = []
    for character in text:
        for index, piece in enumerate(unicodedata.normalize("NFD", character)):
            if not unicodedata.combining(piece):
                ordered += sorted(marks, key=_combining_class)
                marks = []
                ordered.append((piece, min(index, 1)))
            else:
                marks.append((piece, min(index, 1)))
    return ordered + sorted(marks, key=_combining_class)


def _combining_class(entry: tuple[str, int]) -> int:
    return unicodedata.combining(entry[0])


def _compose(decomposed: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Canonical composition (UAX 15, D117) that adds up the changes of length of what it joins."""
    composed: list[tuple[str, int]] = []
    starter, last_class = -1, 0
    for character, change in decomposed:
        current_class = unicodedata.combining(character)
        blocked = starter < 0 or (last_class >= current_class and starter != len(composed) - 1)
        pair = None if blocked else _composite(composed[starter][0], character)
        if pair is not None:
            composed[starter] = (pair, composed[starter][1] + change - 1)
            continue
        composed.append((character, change))
        last_class = current_class
        if current_class == 0:
            starter = len(composed) - 1
    return composed


def _composite(first: str, second: str) -> str | None:
    """The character whose canonical decomposition is exactly this pair, if composition may produce it."""
    joined = unicodedata.normalize("NFC", first + second)
    if len(joined) != 1:
        return None
    if "가" <= joined <= "힣":
        return joined
    return joined if unicodedata.decomposition(joined) == f"{ord(first):04X} {ord(second):04X}" else None
