"""Cleaning a prompt before it is tokenized, as references do whose ids differ from today's `CLIPTokenizer`.

Each is a plain text -> text function for the `clean` argument of `bpe.apply`.
"""

import html
import re
import unicodedata

# White_Space of Unicode: str.isspace() also has four separators of ASCII that the references' patterns leave alone.
_SPACES = re.compile(r"[^\S\x1c-\x1f]+")


def openai_clean(text: str) -> str:
    """OpenAI CLIP's cleaning after ftfy: HTML entities resolved twice, whitespace made single spaces, lower case.

    The whole is `lambda text: openai_clean(ftfy.fix_text(text))`. Special tokens typed in capitals count, once lowered.
    """
    resolved = html.unescape(html.unescape(text)).strip()
    return _SPACES.sub(" ", resolved).strip().lower()


def basic_clean(text: str) -> str:
    """BERT's cleaning, which `CLIPTokenizer` fell back on before transformers 5 where ftfy was not installed.

    Control and format characters and U+FFFD vanish, every Chinese character is separated; NFC; lower case.
    """
    spaced = "".join(
        " " if character in "\t\n\r" or category == "Zs" else f" {character} " if _is_chinese(character) else character
        for character in text
        if (category := unicodedata.category(character))[0] != "C" or character in "\t\n\r"
        if character != "\ufffd"
    )
    return " ".join(word.lower() for word in unicodedata.normalize("NFC", spaced).split())


def _is_chinese(character: str) -> bool:
    return any(first <= character <= last for first, last in _CHINESE)


_CHINESE = (
    ("\u4e00", "\u9fff"),
    ("\u3400", "\u4dbf"),
    ("\U00020000", "\U0002a6df"),
    ("\U0002a700", "\U0002b73f"),
    ("\U0002b740", "\U0002b81f"),
    ("\U0002b820", "\U0002ceaf"),
    ("\uf900", "\ufaff"),
    ("\U0002f800", "\U0002fa1f"),
)
