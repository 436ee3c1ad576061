"""Extended grapheme clusters (Unicode Standard Annex 29), as far as text in short clusters can tell.

`unicodedata` has general categories but not the properties this rule is written in, so the exceptions stand here.
Flags (pairs of regional indicators) are left apart: each half takes four bytes of UTF-8, and the one user of this
file, the normaliser, treats every cluster of six bytes or more character by character.
"""

import unicodedata
from bisect import bisect_right


def clusters(text: str) -> list[str]:
    """`text` cut into its grapheme clusters, in order; their concatenation is `text`."""
    if not text:
        return []
    starts = [0]
    kinds = [_kind(character) for character in text]
    for index in range(1, len(text)):
        if not _joined(text, kinds, index):
            starts.append(index)
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def _joined(text: str, kinds: list[str], index: int) -> bool:
    """Whether no cluster boundary lies before `text[index]` (rules GB3 to GB11 of the annex)."""
    before, after = kinds[index - 1], kinds[index]
    if before == "control" or after == "control":
        return text[index - 1 : index + 1] == "\r\n"
    if after in ("extend", "spacing") or before == "prepend":
        return True
    if (before, after) in _HANGUL_PAIRS:
        return True
    if after == "pictograph" and text[index - 1] == "\u200d":
        return _last_other(text, kinds, index - 1) == "pictograph"
    if after == "consonant" and before == "extend":
        run = _extends_before(text, kinds, index)
        return any(c in _LINKERS for c in run) and _last_other(text, kinds, index) == "consonant"
    return False


def _extends_before(text: str, kinds: list[str], index: int) -> str:
    start = index
    while start and kinds[start - 1] == "extend":
        start -= 1
    return text[start:index]


def _last_other(text: str, kinds: list[str], index: int) -> str:
    """Kind of the nearest character before `index` that is not an extending one."""
    start = index - len(_extends_before(text, kinds, index))
    return kinds[start - 1] if start else ""


def _kind(character: str) -> str:
    code = ord(character)
    if 0x20 <= code < 0x7F:
        return ""
    if 0xAC00 <= code <= 0xD7A3:
        return "LVT" if (code - 0xAC00) % 28 else "LV"
    last, kind = _SPANS[bisect_right(_FIRSTS, code) - 1]
    return kind if code <= last else _KIND_OF_CATEGORY.get(unicodedata.category(character), "")


_KIND_OF_CATEGORY = {
    **dict.fromkeys(("Mn", "Me"), "extend"),
    "Mc": "spacing",
    **dict.fromkeys(("Cc", "Cf", "Zl", "Zp"), "control"),
}


_HANGUL_PAIRS = {
    *(("L", after) for after in ("L", "V", "LV", "LVT")),
    *((before, after) for before in ("LV", "V") for after in ("V", "T")),
    *((before, "T") for before in ("LVT", "T")),
}

# Viramas that bind two consonants of the same script into one cluster (Indic_Conjunct_Break = Linker).
_LINKERS = "\u094d\u09cd\u0acd\u0b4d\u0c4d\u0d4d"

# What the general category does not say, by first and last code point.
_RANGES = {
    # Spacing marks that stand alone.
    "": (
        *((0x102B, 0x102C), (0x1038, 0x1038), (0x1062, 0x1064), (0x1067, 0x106D), (0x1083, 0x1083), (0x1087, 0x108C)),
        *((0x108F, 0x108F), (0x109A, 0x109C), (0x1A61, 0x1A61), (0x1A63, 0x1A64), (0xAA7B, 0xAA7B), (0xAA7D, 0xAA7D)),
        (0x11720, 0x11721),
    ),
    "spacing": ((0x0E33, 0x0E33), (0x0EB3, 0x0EB3)),
    "extend": (
        *((0x09BE, 0x09BE), (0x09D7, 0x09D7), (0x0B3E, 0x0B3E), (0x0B57, 0x0B57), (0x0BBE, 0x0BBE), (0x0BD7, 0x0BD7)),
        *((0x0CC2, 0x0CC2), (0x0CD5, 0x0CD6), (0x0D3E, 0x0D3E), (0x0D57, 0x0D57), (0x0DCF, 0x0DCF), (0x0DDF, 0x0DDF)),
        *((0x1B35, 0x1B35), (0x200C, 0x200D), (0x302E, 0x302F), (0xFF9E, 0xFF9F), (0x1133E, 0x1133E)),
        *((0x11357, 0x11357), (0x114B0, 0x114B0), (0x114BD, 0x114BD), (0x115AF, 0x115AF), (0x11930, 0x11930)),
        *((0x1D165, 0x1D165), (0x1D16E, 0x1D172)),
        *((0x1F3FB, 0x1F3FF), (0xE0020, 0xE007F)),
    ),
    "prepend": (
        *((0x0600, 0x0605), (0x06DD, 0x06DD), (0x070F, 0x070F), (0x0890, 0x0891), (0x08E2, 0x08E2), (0x0D4E, 0x0D4E)),
        *((0x110BD, 0x110BD), (0x110CD, 0x110CD), (0x111C2, 0x111C3), (0x1193F, 0x1193F), (0x11941, 0x11941)),
        *((0x11A3A, 0x11A3A), (0x11A84, 0x11A89), (0x11D46, 0x11D46), (0x11F02, 0x11F02)),
    ),
    "control": ((0x2065, 0x2065), (0xFFF0, 0xFFF8), (0xE0000, 0xE001F), (0xE0080, 0xE00FF), (0xE01F0, 0xE0FFF)),
    "L": ((0x1100, 0x115F), (0xA960, 0xA97C)),
    "V": ((0x1160, 0x11A7), (0xD7B0, 0xD7C6)),
    "T": ((0x11A8, 0x11FF), (0xD7CB, 0xD7FB)),
    # Extended_Pictographic
    "pictograph": (
        *((0xA9, 0xA9), (0xAE, 0xAE), (0x203C, 0x203C), (0x2049, 0x2049), (0x2122, 0x2122), (0x2139, 0x2139)),
        *((0x2194, 0x2199), (0x21A9, 0x21AA), (0x231A, 0x231B), (0x2328, 0x2328), (0x2388, 0x2388), (0x23CF, 0x23CF)),
        *((0x23E9, 0x23F3), (0x23F8, 0x23FA), (0x24C2, 0x24C2), (0x25AA, 0x25AB), (0x25B6, 0x25B6), (0x25C0, 0x25C0)),
        *((0x25FB, 0x25FE), (0x2600, 0x2605), (0x2607, 0x2612), (0x2614, 0x2685), (0x2690, 0x2705), (0x2708, 0x2712)),
        *((0x2714, 0x2714), (0x2716, 0x2716), (0x271D, 0x271D), (0x2721, 0x2721), (0x2728, 0x2728), (0x2733, 0x2734)),
        *((0x2744, 0x2744), (0x2747, 0x2747), (0x274C, 0x274C), (0x274E, 0x274E), (0x2753, 0x2755), (0x2757, 0x2757)),
        *((0x2763, 0x2767), (0x2795, 0x2797), (0x27A1, 0x27A1), (0x27B0, 0x27B0), (0x27BF, 0x27BF), (0x2934, 0x2935)),
        *((0x2B05, 0x2B07), (0x2B1B, 0x2B1C), (0x2B50, 0x2B50), (0x2B55, 0x2B55), (0x3030, 0x3030), (0x303D, 0x303D)),
        *((0x3297, 0x3297), (0x3299, 0x3299), (0x1F000, 0x1F0FF), (0x1F10D, 0x1F10F), (0x1F12F, 0x1F12F)),
        *((0x1F16C, 0x1F171), (0x1F17E, 0x1F17F), (0x1F18E, 0x1F18E), (0x1F191, 0x1F19A), (0x1F1AD, 0x1F1E5)),
        *((0x1F201, 0x1F20F), (0x1F21A, 0x1F21A), (0x1F22F, 0x1F22F), (0x1F232, 0x1F23A), (0x1F23C, 0x1F23F)),
        *((0x1F249, 0x1F3FA), (0x1F400, 0x1F53D), (0x1F546, 0x1F64F), (0x1F680, 0x1F6FF), (0x1F774, 0x1F77F)),
        *((0x1F7D5, 0x1F7FF), (0x1F80C, 0x1F80F), (0x1F848, 0x1F84F), (0x1F85A, 0x1F85F), (0x1F888, 0x1F88F)),
        *((0x1F8AE, 0x1F8FF), (0x1F90C, 0x1F93A), (0x1F93C, 0x1F945), (0x1F947, 0x1FAFF), (0x1FC00, 0x1FFFD)),
    ),
    # Indic_Conjunct_Break = Consonant
    "consonant": (
        *((0x0915, 0x0939), (0x0958, 0x095F), (0x0978, 0x097F), (0x0995, 0x09A8), (0x09AA, 0x09B0), (0x09B2, 0x09B2)),
        *((0x09B6, 0x09B9), (0x09DC, 0x09DD), (0x09DF, 0x09DF), (0x09F0, 0x09F1), (0x0A95, 0x0AA8), (0x0AAA, 0x0AB0)),
        *((0x0AB2, 0x0AB3), (0x0AB5, 0x0AB9), (0x0AF9, 0x0AF9), (0x0B15, 0x0B28), (0x0B2A, 0x0B30), (0x0B32, 0x0B33)),
        *((0x0B35, 0x0B39), (0x0B5C, 0x0B5D), (0x0B5F, 0x0B5F), (0x0B71, 0x0B71), (0x0C15, 0x0C28), (0x0C2A, 0x0C39)),
        *((0x0C58, 0x0C5A), (0x0D15, 0x0D3A)),
    ),
}

_SORTED = [(0, -1, ""), *sorted((first, last, kind) for kind, ranges in _RANGES.items() for first, last in ranges)]
_FIRSTS = [first for first, _, _ in _SORTED]
_SPANS = [(last, kind) for _, last, kind in _SORTED]
