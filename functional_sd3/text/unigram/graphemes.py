"""Extended grapheme clusters (Unicode Standard Annex 29), exact for short clusters.

`unicodedata` has general categories but not the properties that the rules use, so the exceptions are listed here. Flags
(pairs of regional indicators) are not joined: their clusters take at least eight bytes of UTF-8, and the normaliser,
the only caller, treats such clusters character by character.
"""

import unicodedata
from bisect import bisect_right


def clusters(text: str) -> list[str]:
    """`text` cut into its grapheme clusters, in order; their concatenation is `text`."""
    if not text:
        return []
    starts = [0]
    kinds = list(map(_Kinds().__getitem__, text))
    for index in range(1, len(text)):
        if not _joined(text, kinds, index):
            starts.append(index)
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def _joined(text: str, kinds: list[str], index: int) -> bool:
    """True if no cluster boundary lies before `text[index]` (rules GB3 to GB11 of the annex)."""
    before, after = kinds[index - 1], kinds[index]
    if before == "control" or after == "control":
        return text[index - 1 : index + 1] == "\r\n"
    if after in ("extend", "spacing") or before == "prepend":
        return True
    if (before, after) in _HANGUL_PAIRS:
        return True
    if after == "pictograph" and text[index - 1] == "\u200d":
        start = _first_extend(kinds, index - 1)
        return kinds[start - 1 : start] == ["pictograph"] and "\u200d" not in text[start : index - 1]
    if after == "consonant" and before == "extend":
        start = _first_extend(kinds, index)
        bound = any(character in _LINKERS for character in text[start:index]) and "\u200c" not in text[start:index]
        return kinds[start - 1 : start] == ["consonant"] and bound
    return False


def _first_extend(kinds: list[str], end: int) -> int:
    """Index of the first of the extending characters before `end`."""
    while end and kinds[end - 1] == "extend":
        end -= 1
    return end


class _Kinds(dict):
    """Kinds of characters, looked up once each."""

    def __missing__(self, character: str) -> str:
        self[character] = kind = _kind(character)
        return kind


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

# Viramas that bind two consonants into one cluster (Indic_Conjunct_Break = Linker).
_LINKERS = (
    "\u094d\u09cd\u0acd\u0b4d\u0c4d\u0d4d\u1039\u17d2\u1a60\u1b44\u1bab\ua9c0\uaaf6"
    "\U00010a3f\U00011133\U000113d0\U0001193e\U00011a47\U00011a99\U00011f42"
)

# Properties beyond the general category: code points and ranges of them, hexadecimal, from Unicode 17.
_RANGES = {
    # Spacing marks that are graphemes of their own.
    "": "102B-102C 1038 1062-1064 1067-106D 1083 1087-108C 108F 109A-109C 1A61 1A63-1A64 AA7B AA7D 11720-11721",
    # Spacing marks by another category, or newer than Python 3.11's Unicode.
    "spacing": "CF3 E33 EB3 1171E",
    # Extending characters by another category, or newer than Python 3.11's Unicode.
    "extend": (
        "897 9BE 9D7 B3E B57 BBE BD7 CC0 CC2 CC7-CC8 CCA-CCB CD5-CD6 D3E D57 DCF DDF ECE 1715 1734 1ACF-1ADD "
        "1AE0-1AEB 1B35 1B3B 1B3D 1B43-1B44 1BAA 1BF2-1BF3 200C-200D 302E-302F A953 A9C0 FF9E-FF9F 10D69-10D6D "
        "10EFA-10EFF 111C0 11235 11241 1133E 1134D 11357 113B8-113C0 113C2 113C5 113C7-113CA 113CC-113D0 113D2 "
        "113E1-113E2 114B0 114BD 115AF 116B6 11930 1193D 11B60-11B67 11F00-11F01 11F03 11F34-11F3A 11F3E-11F42 "
        "11F5A 13440 13447-13455 1611E-1612F 16FF0-16FF1 1D165 1D166 1D16D 1D16E-1D172 1E08F 1E4EC-1E4EF "
        "1E5EE-1E5EF 1E6E3 1E6E6 1E6EE-1E6EF 1E6F5 1F3FB-1F3FF E0020-E007F"
    ),
    # Prepended_Concatenation_Mark and letters that precede their base.
    "prepend": "600-605 6DD 70F 890-891 8E2 D4E 110BD 110CD 111C2-111C3 113D1 1193F 11941 11A84-11A89 11D46 11F02",
    # Unassigned code points that are ignorable by default.
    "control": "2065 FFF0-FFF8 E0000-E001F E0080-E00FF E01F0-E0FFF",
    # Hangul_Syllable_Type
    "L": "1100-115F A960-A97C",
    "V": "1160-11A7 D7B0-D7C6",
    "T": "11A8-11FF D7CB-D7FB",
    # Extended_Pictographic
    "pictograph": (
        "A9 AE 203C 2049 2122 2139 2194-2199 21A9-21AA 231A-231B 2328 23CF 23E9-23F3 23F8-23FA 24C2 25AA-25AB "
        "25B6 25C0 25FB-25FE 2600-2604 260E 2611 2614-2615 2618 261D 2620 2622-2623 2626 262A 262E-262F 2638-263A "
        "2640 2642 2648-2653 265F-2660 2663 2665-2666 2668 267B 267E-267F 2692-2697 2699 269B-269C 26A0-26A1 26A7 "
        "26AA-26AB 26B0-26B1 26BD-26BE 26C4-26C5 26C8 26CE-26CF 26D1 26D3-26D4 26E9-26EA 26F0-26F5 26F7-26FA 26FD "
        "2702 2705 2708-270D 270F 2712 2714 2716 271D 2721 2728 2733-2734 2744 2747 274C 274E 2753-2755 2757 "
        "2763-2764 2795-2797 27A1 27B0 27BF 2934-2935 2B05-2B07 2B1B-2B1C 2B50 2B55 3030 303D 3297 3299 1F004 "
        "1F02C-1F02F 1F094-1F09F 1F0AF-1F0B0 1F0C0 1F0CF-1F0D0 1F0F6-1F0FF 1F170-1F171 1F17E-1F17F 1F18E "
        "1F191-1F19A 1F1AE-1F1E5 1F201-1F20F 1F21A 1F22F 1F232-1F23A 1F23C-1F23F 1F249-1F25F 1F266-1F321 "
        "1F324-1F393 1F396-1F397 1F399-1F39B 1F39E-1F3F0 1F3F3-1F3F5 1F3F7-1F3FA 1F400-1F4FD 1F4FF-1F53D "
        "1F549-1F54E 1F550-1F567 1F56F-1F570 1F573-1F57A 1F587 1F58A-1F58D 1F590 1F595-1F596 1F5A4-1F5A5 1F5A8 "
        "1F5B1-1F5B2 1F5BC 1F5C2-1F5C4 1F5D1-1F5D3 1F5DC-1F5DE 1F5E1 1F5E3 1F5E8 1F5EF 1F5F3 1F5FA-1F64F "
        "1F680-1F6C5 1F6CB-1F6D2 1F6D5-1F6E5 1F6E9 1F6EB-1F6F0 1F6F3-1F6FF 1F7DA-1F7FF 1F80C-1F80F 1F848-1F84F "
        "1F85A-1F85F 1F888-1F88F 1F8AE-1F8AF 1F8BC-1F8BF 1F8C2-1F8CF 1F8D9-1F8FF 1F90C-1F93A 1F93C-1F945 "
        "1F947-1F9FF 1FA58-1FA5F 1FA6E-1FAFF 1FC00-1FFFD"
    ),
    # Indic_Conjunct_Break = Consonant
    "consonant": (
        "915-939 958-95F 978-97F 995-9A8 9AA-9B0 9B2 9B6-9B9 9DC-9DD 9DF 9F0-9F1 A95-AA8 AAA-AB0 AB2-AB3 AB5-AB9 "
        "AF9 B15-B28 B2A-B30 B32-B33 B35-B39 B5C-B5D B5F B71 C15-C28 C2A-C39 C58-C5A D15-D3A 1000-102A 103F "
        "1050-1055 105A-105D 1061 1065-1066 106E-1070 1075-1081 108E 1780-17B3 1A20-1A54 1B0B-1B0C 1B13-1B33 "
        "1B45-1B4C 1B83-1BA0 1BAE-1BAF 1BBB-1BBD A989-A98B A98F-A9B2 A9E0-A9E4 A9E7-A9EF A9FA-A9FE AA60-AA6F "
        "AA71-AA73 AA7A AA7E-AA7F AAE0-AAEA ABC0-ABDA 10A00 10A10-10A13 10A15-10A17 10A19-10A35 11103-11126 11144 "
        "11147 11380-11389 1138B 1138E 11390-113B5 11900-11906 11909 1190C-11913 11915-11916 11918-1192F 11A00 "
        "11A0B-11A32 11A50 11A5C-11A83 11F04-11F10 11F12-11F33"
    ),
}

_SORTED = sorted(
    (int(span.split("-")[0], 16), int(span.split("-")[-1], 16), kind)
    for kind, spans in _RANGES.items()
    for span in spans.split()
)
_FIRSTS = [0, *(first for first, _, _ in _SORTED)]
_SPANS = [(-1, ""), *((last, kind) for _, last, kind in _SORTED)]
