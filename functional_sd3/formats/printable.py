"""Text from files and arguments, made safe to print on a terminal."""

import unicodedata
from collections.abc import Sequence

_ESCAPED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Control, format (bidirectional overrides among them), surrogate, private and unassigned characters, line ends."""
_MAX_NAMED = 5


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


def counted(number: int, unit: str) -> str:
    """A number with its unit, "1 image", "2 images"."""
    return f"{number} {unit}{'' if number == 1 else 's'}"


def named(names: Sequence[str], unit: str = "images") -> str:
    """The number of names and the first of them: "7 images (a.png, b.png, c.png, d.png, e.png and 2 more)"."""
    shown = ", ".join(shorten(name, 60) for name in names[:_MAX_NAMED])
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{counted(len(names), unit.removesuffix('s'))} ({shown}{more})"
