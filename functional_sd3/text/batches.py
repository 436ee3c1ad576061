"""A batch of texts, checked before anything is tokenized."""

import re
from collections.abc import Iterable, Sequence, Set
from typing import Any

MAX_LENGTH = 2**20
_SURROGATE = re.compile("[\ud800-\udfff]")


def text_batch(texts: str | Sequence[str], name: str = "text") -> list[str]:
    """`texts` as a list; one string is a batch of one.

    Raises ValueError, naming the first text that is wrong, for anything but strings in order and for lone surrogates,
    which UTF-8 cannot write. `name`: what the caller calls one of them.
    """
    if isinstance(texts, bytes | bytearray | Set) or not isinstance(texts, Iterable):
        raise ValueError(f"{name}s are {_shown(texts)}; a string or a list of strings is right")
    batch = [texts] if isinstance(texts, str) else list(texts)
    for index, text in enumerate(batch):
        if not isinstance(text, str):
            raise ValueError(f"{name} {index} is {_shown(text)}; a string is right")
        if not text.isascii() and _SURROGATE.search(text):
            raise ValueError(f"{name} {index} holds a lone surrogate, which UTF-8 cannot write: {text!r:.60}")
    return batch


def check_length(length: int | None) -> None:
    """Raises ValueError for a number of tokens that every text would be padded to in vain; None is no padding."""
    if length is not None and length > MAX_LENGTH:
        raise ValueError(
            f"length {length} must be at most {MAX_LENGTH:,}, as every text is padded to it; None pads none"
        )


def _shown(value: Any) -> str:
    return f"of type {type(value).__name__}, {value!r:.60}"
