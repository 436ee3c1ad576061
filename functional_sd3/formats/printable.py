"""Text from files and arguments, made safe to print on a terminal."""

import unicodedata

_ESCAPED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Control, format (bidirectional overrides among them), surrogate, private and unassigned characters, line ends."""


def escape(text: object, *, keep: str = "") -> str:
    r"""`str(text)` with every character that a terminal may act on written as an escape (`\x1b`, `\u202e`).

    keep: such characters that stay as they are, "\n" for a text of several lines. Printable text is returned unchanged.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter if letter in keep or unicodedata.category(letter) not in _ESCAPED_CATEGORIES else _escaped(letter)
        for letter in text
    )


def shorten(text: object, length: int = 80) -> str:
    """`escape(text)` cut to `length` characters, the last three of which are dots where something was cut."""
    # A text of gigabytes is cut before it is looked at.
    text = escape(str(text)[: length + 1])
    return text if len(text) <= length else text[: length - 3] + "..."


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")
