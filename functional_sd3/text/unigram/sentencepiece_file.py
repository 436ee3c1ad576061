"""SentencePiece's model file (`spiece.model`): the fields of its protobuf that a unigram tokenizer needs.

A protobuf message is a sequence of (key, value): the key is `field number << 3 | wire type`, and the wire types that
occur are 0 (varint), 1 (8 bytes), 2 (length, then bytes) and 5 (4 bytes). Field numbers: sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from functional_sd3.formats.printable import shorten
from functional_sd3.text.token_fields import MAX_PIECES

NORMAL, UNKNOWN, CONTROL = 1, 2, 3
_UNIGRAM = 1


class Piece(NamedTuple):
    """One entry of the vocabulary; `score` is a float32, `kind` one of the type numbers of the format."""

    text: str
    score: float
    kind: int = NORMAL


class SentencePieceModel(NamedTuple):
    """Contents of a model file: pieces in the order of their ids, and the character map (empty: none)."""

    pieces: tuple[Piece, ...]
    charsmap: bytes


def parse(data: bytes) -> SentencePieceModel:
    """The unigram model stored in `data`.

    Raises ValueError when the bytes are no such message, or when the file uses a feature that T5 does not: another
    model type, byte fallback, user-defined symbols, or other treatment of white space.
    """
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(data):
            if number == 1:
                if len(pieces) == MAX_PIECES:
                    raise ValueError(f"it has more than {MAX_PIECES:,} pieces")
                pieces.append(_piece(_message(value)))
            elif number == 2:
                trainer = dict(_fields(_message(value)))
            elif number == 3:
                normalizer = dict(_fields(_message(value)))
        charsmap = normalizer.get(2, b"")
        if not isinstance(charsmap, bytes):
            raise ValueError("its character map is a number")
    except IndexError:
        raise ValueError("not a sentencepiece model: it ends within a number") from None
    except (ValueError, struct.error, TypeError) as error:
        raise ValueError(f"not a sentencepiece model: {error}") from None
    kind = trainer.get(3, _UNIGRAM)
    unsupported = [piece for piece in pieces if piece.kind not in _KINDS]
    problems = [
        problem
        for wrong, problem in (
            (not pieces, "it has no pieces"),
            (kind != _UNIGRAM, f"its model type is {shorten(repr(kind))}, want {_UNIGRAM} (unigram)"),
            (trainer.get(35, 0), "it falls back to bytes, which T5 does not"),
            (trainer.get(24, 0), "it treats white space as a suffix, which T5 does not"),
            *((not normalizer.get(field, 1), f"its normalizer switches {name} off") for field, name in _SPACES.items()),
            *((True, f"piece {shorten(text)!r} is of type {shorten(repr(of))}") for text, _, of in unsupported[:5]),
        )
        if wrong
    ]
    if problems:
        raise ValueError(f"not a T5 sentencepiece model: {'; '.join(problems[:5])}")
    return SentencePieceModel(tuple(pieces), charsmap)


def serialize(model: SentencePieceModel) -> bytes:
    """Bytes that `parse` and the sentencepiece library read as `model`; pad, end and unknown pieces are recognised by
    type."""
    names = {piece.text: index for index, piece in enumerate(model.pieces) if piece.kind != NORMAL}
    unknown = next(index for index, piece in enumerate(model.pieces) if piece.kind == UNKNOWN)
    # Ids of unknown, begin, end and padding; protobuf writes -1, "there is none", as 64 bits.
    ids = {40: unknown, 41: -1, 42: names.get("</s>", -1), 43: names.get("<pad>", -1)}
    trainer = _varint_field(3, _UNIGRAM) + _varint_field(4, len(model.pieces))
    trainer += b"".join(_varint_field(number, value % (1 << 64)) for number, value in ids.items())
    normalizer = _bytes_field(1, b"precompiled" if model.charsmap else b"identity")
    normalizer += _bytes_field(2, model.charsmap) + b"".join(_varint_field(number, 1) for number in _SPACES)
    return b"".join(
        [
            *(_bytes_field(1, _serialize_piece(piece)) for piece in model.pieces),
            _bytes_field(2, trainer),
            _bytes_field(3, normalizer),
        ]
    )


_MAX_VARINT_BITS = 7 * 10
_KINDS = (NORMAL, UNKNOWN, CONTROL)
_SPACES = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}


def _piece(message: bytes) -> Piece:
    fields = dict(_fields(message))
    text = fields.get(1)
    if not isinstance(text, bytes):
        raise ValueError("a piece has no text")
    score, kind = fields.get(2, b"\0\0\0\0"), fields.get(3, NORMAL)
    if not isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError("the score or the type of a piece is of another kind")
    return Piece(text.decode(), struct.unpack("<f", score)[0], kind)


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a message is a number")
    return value


def _serialize_piece(piece: Piece) -> bytes:
    kind = b"" if piece.kind == NORMAL else _varint_field(3, piece.kind)
    return _bytes_field(1, piece.text.encode()) + b"\x15" + struct.pack("<f", piece.score) + kind


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Every (field number, value) of a message: an int for varints, bytes for everything else."""
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position)
        wire = key & 7
        value: int | bytes
        if wire == 0:
            value, position = _varint(message, position)
        else:
            if wire == 2:
                length, position = _varint(message, position)
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            else:
                raise ValueError(f"wire type {wire} at byte {position}")
            value = message[position : position + length]
            position += length
            if position > end:
                raise ValueError(f"a field ends at byte {position} of {end}")
        yield key >> 3, value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    byte = message[position]
    position += 1
    value, shift = byte & 0x7F, 7
    while byte & 0x80:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if shift > _MAX_VARINT_BITS:
            raise ValueError(f"a number before byte {position} has more than 64 bits")
    return value, position


def _varint_field(number: int, value: int) -> bytes:
    return _encode(number << 3) + _encode(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _encode(number << 3 | 2) + _encode(len(value)) + value


def _encode(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
