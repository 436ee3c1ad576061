"""SentencePiece's precompiled character map: a byte trie from spellings to their normal form.

The blob is `u32 size | size bytes of trie units | NUL-terminated UTF-8 replacements`, all little-endian. The trie is a
Darts double array (Aoe 1989; Yata, darts-clone). A unit packs

    bits 0-7, 31   the byte that leads here (bit 31 set: the unit is a value or unused)
    bit 8          a spelling ends here: its value is at the node's base
    bits 9, 10-30  offset from this position to the node's base; bit 9 scales it by 256

and the child of a node by byte b is at `base ^ b`.
"""

import struct
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

_NO_BYTE = 1 << 31
_HAS_VALUE = 1 << 8
_MAX_BYTES = 2**22
"""Bytes of a blob; T5's has 237,539."""
_DEEPEST = 256
"""Bytes of a spelling; T5's longest has 16."""
_MAX_REPLACEMENT = 256
"""Bytes of a replacement; T5's longest has 33. A text of such characters grows that much."""


class Charsmap(NamedTuple):
    """A parsed character map: the trie's units and the blob of replacements their values point into."""

    units: tuple[int, ...]
    replacements: bytes


def parse(blob: bytes) -> Charsmap:
    """The map stored in `blob`.

    Raises ValueError when a walk over it could leave the trie or the replacements, or go in circles, and for a map of
    more than 4 MiB, spellings and replacements of more than 256 bytes.
    """
    if len(blob) > _MAX_BYTES:
        raise ValueError(f"character map of {len(blob):,} bytes is larger than {_MAX_BYTES:,}, the most that is read")
    size = int.from_bytes(blob[:4], "little") if len(blob) > 4 else 0
    if not 0 < size <= len(blob) - 4 or size % 1024:
        raise ValueError(f"character map of {len(blob)} bytes states a trie of {size}: no multiple of 1024 that fits")
    replacements = blob[4 + size :]
    units = np.frombuffer(blob, "<u4", size // 4, 4)
    bases = np.arange(len(units), dtype=np.uint32) ^ ((units >> 10) << ((units & 0x200) >> 6))
    inner = units < _NO_BYTE
    values = units[np.minimum(bases[inner & (units & _HAS_VALUE > 0)], len(units) - 1)] & (_NO_BYTE - 1)
    outside = not inner[0] or (bases[inner] >= len(units)).any() or (values >= len(replacements)).any()
    if outside or replacements[-1:] not in (b"", b"\0"):
        raise ValueError("character map is corrupt: its trie points outside itself or its replacements")
    try:
        replacements.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"character map is corrupt: its replacements are not UTF-8 ({error})") from None
    starts = np.frombuffer(replacements, np.uint8)[values] & 0xC0
    if (starts == 0x80).any():
        raise ValueError("character map is corrupt: a replacement begins within a character")
    if max(map(len, replacements.split(b"\0"))) > _MAX_REPLACEMENT:
        raise ValueError(f"character map holds a replacement of more than {_MAX_REPLACEMENT} bytes")
    if not _ends(units, bases):
        raise ValueError(f"character map goes in circles, or holds a spelling of more than {_DEEPEST} bytes")
    return Charsmap(tuple(units.tolist()), replacements)


def _ends(units: np.ndarray, bases: np.ndarray) -> bool:
    """True if every walk from the root ends within `_DEEPEST` steps."""
    positions = np.arange(len(units), dtype=np.uint32)
    labels = units & 0xFF
    inner = (units < _NO_BYTE) & (labels > 0)
    # A unit is a child of those nodes whose base is its position without its label.
    children, parents = positions[inner], (positions ^ labels)[inner]
    reached = np.zeros(len(units), dtype=bool)
    level = bases[:1]
    for _ in range(_DEEPEST + 2):
        if not len(level):
            return True
        reached[:] = False
        reached[level] = True
        level = bases[children[reached[parents]]]
    return False


def matches(charsmap: Charsmap, data: bytes, start: int = 0) -> list[tuple[int, int]]:
    """Every spelling that `data` has at `start`, shortest first, as (end position, place of its replacement)."""
    units = charsmap.units
    unit = units[0]
    position = (unit >> 10) << ((unit & 0x200) >> 6)
    spellings = []
    for index in range(start, len(data)):
        byte = data[index]
        position ^= byte
        unit = units[position]
        # The format ends strings with NUL, so no spelling holds one.
        if unit & 0x800000FF != byte or not byte:
            break
        position ^= (unit >> 10) << ((unit & 0x200) >> 6)
        # A spelling is of whole characters.
        if unit & _HAS_VALUE and (index + 1 == len(data) or data[index + 1] & 0xC0 != 0x80):
            spellings.append((index + 1, units[position] & (_NO_BYTE - 1)))
    return spellings


def replacement(charsmap: Charsmap, place: int) -> str:
    """The replacement that begins at byte `place`."""
    return charsmap.replacements[place : charsmap.replacements.index(0, place)].decode()


def longest(charsmap: Charsmap, data: bytes, start: int) -> tuple[int, str] | None:
    """End position and replacement of the longest spelling at `start`, the rule of sentencepiece."""
    spellings = matches(charsmap, data, start)
    return (spellings[-1][0], replacement(charsmap, spellings[-1][1])) if spellings else None


def shortest(charsmap: Charsmap, text: str) -> str | None:
    """Replacement of the shortest spelling that `text` begins with, the rule of Hugging Face's `Precompiled`."""
    spellings = matches(charsmap, text.encode())
    return replacement(charsmap, spellings[0][1]) if spellings else None


def ascii_map(charsmap: Charsmap) -> dict[int, str] | None:
    """The map of ASCII text, as a table for `str.translate`; None if pairs of characters matter too."""
    table = {}
    for code in range(1, 128):
        if (mapped := shortest(charsmap, chr(code))) is not None:
            table[code] = mapped
        for follower in range(1, 128):
            pair = matches(charsmap, bytes((code, follower)))
            if pair and pair[-1][0] == 2:
                return None
    return table


def build(mapping: Mapping[str, str]) -> bytes:
    """The blob that maps every key of `mapping` to its value; keys are non-empty and nothing holds NUL.

    Deterministic. The longest key wins in sentencepiece, so keys may be prefixes of one another.
    """
    bad = [key for key, value in mapping.items() if not key or "\0" in key + value]
    if bad:
        raise ValueError(f"character map keys must be non-empty and free of NUL, and so their values; got {bad[:5]}")
    root: dict = {}
    blob = bytearray()
    places: dict[str, int] = {}
    for key in sorted(mapping):
        node = root
        for byte in key.encode():
            node = node.setdefault(byte, {})
        if mapping[key] not in places:
            places[mapping[key]] = len(blob)
            blob += mapping[key].encode() + b"\0"
        node[0] = places[mapping[key]]
    units = _layout(root)
    return struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + bytes(blob)


def _layout(root: dict) -> list[int]:
    """Units of a double array for a trie of nested dicts, where key 0 holds a node's value."""
    units: dict[int, int] = {0: 0}
    taken_bases: set[int] = set()
    queue = [(0, root)]
    for position, node in queue:
        # A base belongs to one node only: otherwise one node's children would be taken for the other's.
        base = 1
        while base in taken_bases or any((base ^ byte) in units for byte in node) or not _reachable(position ^ base):
            base += 1
        taken_bases.add(base)
        offset = position ^ base
        units[position] |= offset << 10 if offset < 1 << 21 else offset << 2 | 1 << 9
        for byte, child in node.items():
            if byte:
                units[base ^ byte] = byte
                queue.append((base ^ byte, child))
            else:
                units[base] = _NO_BYTE | child
                units[position] |= _HAS_VALUE
    size = (max(units) // 256 + 1) * 256
    return [units.get(position, _NO_BYTE) for position in range(size)]


def _reachable(offset: int) -> bool:
    return offset < 1 << 21 or (offset < 1 << 29 and not offset & 0xFF)
