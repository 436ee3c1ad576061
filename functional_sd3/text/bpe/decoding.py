"""Ids of CLIP's byte-pair tokenizer back to text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from functional_sd3.text.bpe.merge import BYTES, END_OF_WORD

if TYPE_CHECKING:
    from functional_sd3.text.bpe.tables import Tables


def decode(tables: "Tables", ids: Tensor | Sequence[Any], *, skip_special: bool = True) -> str | list[str]:
    """The text of ids (a string for one row, a list of strings for several), in lower case, words separated by one
    space.

    `skip_special` leaves out the start, end and padding tokens and every other special one. Bytes that are not UTF-8
    (half a character) become U+FFFD. Raises ValueError for an id outside the vocabulary.
    """
    is_batch = ids.ndim > 1 if isinstance(ids, Tensor) else any(not isinstance(row, int) for row in ids)
    rows: list[Any] = [row.tolist() if isinstance(row, Tensor) else row for row in ids]
    return [_decode(tables, row, skip_special) for row in rows] if is_batch else _decode(tables, rows, skip_special)


def _decode(tables: "Tables", ids: Sequence[int], skip_special: bool) -> str:
    unknown = [i for i in ids if i not in tables.names]
    if unknown:
        raise ValueError(f"ids {unknown[:5]} are not in the vocabulary of {len(tables.names)} tokens")
    special = {entry.id for entry in tables.specials if entry.special} if skip_special else set()
    tokens = [tables.names[i] for i in ids if i not in special]
    return b"".join(map(_token_bytes, tokens)).decode(errors="replace").strip(" ")


def _token_bytes(token: str) -> bytes:
    body, space = (token.removesuffix(END_OF_WORD), b" ") if token.endswith(END_OF_WORD) else (token, b"")
    try:
        return bytes([BYTES[symbol] for symbol in body]) + space
    except KeyError:  # an added token written in characters
        return token.encode()
