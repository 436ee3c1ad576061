"""GGUF files read: SD3's transformer, its encoders and its VAE quantised to a few bits a weight.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): a magic, counts, values by name, descriptions of
tensors, then, aligned, their bytes. Names are those of the file it was made from, but of T5 those of llama.cpp. As for
every file nothing is read of a tensor before it is used, and nothing is believed that the file cannot hold.
"""

import math
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from functional_sd3.formats import bounded, files, magic
from functional_sd3.formats.blocks import BLOCKS
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.files import Mapped
from functional_sd3.formats.header import MAX_TENSORS, Entry, Header, too_many
from functional_sd3.formats.printable import shorten

_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
_PLAIN = {**_FLOATS, 24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64}
_SMALL = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"}
_BLOCKS = {**_SMALL, 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS"}
_UNREAD = {9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S"}
_UNREAD |= {29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"}
_MAX_DIMENSIONS = 8
_MAX_VALUES = 2**16
# The words of large tokenizers are some hundred thousand.
_MAX_STRINGS = 2**20
_MAX_HEADER = 2**27
_ALIGNMENT = "general.alignment"
# ComfyUI's converter flattens what ggml has no place for, and notes the shape it had.
_SHAPE = "comfy.gguf.orig_shape."
_OF_T5 = {
    "enc": "encoder",
    "blk": "block",
    "token_embd": "shared",
    "output_norm": "final_layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
"""Part of a name in llama.cpp -> what transformers calls it."""


def open_gguf(path: Path) -> Mapped:
    """The file mapped, with the header that a safetensors file of its tensors would have; blocks count as float32.

    Raises WeightsError for what is truncated, contradicts itself, or is in a format whose blocks we do not decode.
    """
    with bounded.open_file(path) as file:
        buffer = files.map_bytes(path, file)
    size = len(buffer)
    try:
        described = _read(_Reader(buffer, min(size, _MAX_HEADER)))
        entries = {name: _entry(name, one, size) for name, one in described.tensors.items()}
        _check_apart(entries)
    except (ValueError, struct.error) as error:
        reason = "is truncated" if isinstance(error, struct.error) else str(error)
        raise WeightsError(f"{path}: is a GGUF file that cannot be read: {reason}") from error
    texts = {name: value for name, value in described.values.items() if isinstance(value, str)}
    return Mapped(path, Header(_renamed(entries), texts, drops_ones=True), buffer)


def with_leading_ones(
    places: Mapping[str, Mapped], names: Mapping[str, str], wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, Mapped]:
    """The places with the leading dimensions of 1 that ggml drops (`Header.drops_ones`).

    names: the proper name of a tensor -> its name in its file; wanted: proper name -> shape.
    """
    changed: dict[int, dict[str, Entry]] = {}
    for proper, name in names.items():
        header, shape = places[name].header, wanted.get(proper, ())
        entry = header.tensors[name]
        if header.drops_ones and entry.shape != shape == (1,) * (len(shape) - len(entry.shape)) + entry.shape:
            changed.setdefault(id(places[name]), {})[name] = entry._replace(shape=shape)
    known = {id(mapped): mapped for mapped in places.values()}
    for key, entries in changed.items():
        header = known[key].header
        known[key] = known[key]._replace(header=header._replace(tensors={**header.tensors, **entries}))
    return {name: known[id(mapped)] for name, mapped in places.items()}


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    kind: int
    start: int


class _Described(NamedTuple):
    values: dict[str, Any]
    tensors: dict[str, _Tensor]


class _Reader:
    """A place in the bytes that moves on as numbers and names are read."""

    def __init__(self, buffer: Any, size: int) -> None:
        self.buffer, self.size, self.place = buffer, size, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.buffer, self.place)
        self.place += struct.calcsize("<" + code)
        return value

    def content(self, length: int) -> bytes:
        if length > self.size - self.place:
            raise ValueError(f"{length} bytes at {self.place} are more than it has ({self.size})")
        self.place += length
        return self.buffer[self.place - length : self.place]

    def text(self) -> str:
        return self.content(self.number("Q")).decode("utf-8", errors="backslashreplace")

    def value(self) -> Any:
        """A value behind its type; of lists only short ones of numbers, as shapes are."""
        kind = self.number("I")
        if kind != _ARRAY:
            return self._single(kind)
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            if count > _MAX_STRINGS:
                raise ValueError(f"a list in it has {count:,} texts, more than {_MAX_STRINGS:,}")
            for _ in range(count):
                self.content(self.number("Q"))
            return None
        content = self.content(count * struct.calcsize("<" + _code(kind)))
        return struct.unpack(f"<{count}{_code(kind)}", content) if count <= _MAX_DIMENSIONS else None

    def _single(self, kind: int) -> Any:
        return self.text() if kind == _STRING else self.number(_code(kind))


def _read(reader: _Reader) -> _Described:
    if reader.content(4) != magic.GGUF:
        raise ValueError("its magic is another")
    if (version := reader.number("I")) not in _VERSIONS:
        raise ValueError(f"its version {version} must be {' or '.join(map(str, _VERSIONS))}, low bytes first")
    tensors, values = reader.number("Q"), reader.number("Q")
    if tensors > MAX_TENSORS:
        raise ValueError(too_many(tensors))
    if values > _MAX_VALUES:
        raise ValueError(f"has {values:,} values by name, more than {_MAX_VALUES:,}")
    metadata: dict[str, Any] = {}
    for _ in range(values):
        name = reader.text()
        if name in metadata:
            raise ValueError(f"{name!r} is named twice")
        metadata[name] = reader.value()
    described: dict[str, _Tensor] = {}
    for _ in range(tensors):
        name = reader.text()
        if name in described:
            raise ValueError(f"{name!r} is named twice")
        described[name] = _described(reader, metadata.get(_SHAPE + name))
    alignment = metadata.get(_ALIGNMENT, 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**16:
        raise ValueError(f"{_ALIGNMENT} is {alignment!r}, not a size")
    start = -(-reader.place // alignment) * alignment
    return _Described(metadata, {name: one._replace(start=start + one.start) for name, one in described.items()})


def _described(reader: _Reader, shape: Any) -> _Tensor:
    count = reader.number("I")
    if count > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {count} dimensions, more than {_MAX_DIMENSIONS}")
    stored = tuple(reader.number("Q") for _ in range(count))[::-1]
    # A list of one number may be written as the number.
    shape = stored if shape is None else shape if isinstance(shape, tuple) else (shape,)
    if any(type(side) is not int or side < 0 for side in shape) or math.prod(shape) != math.prod(stored):
        raise ValueError(f"a tensor of {list(stored)} is said to have had the shape {shorten(repr(shape))}")
    return _Tensor(shape, reader.number("I"), reader.number("Q"))


def _entry(name: str, one: _Tensor, size: int) -> Entry:
    shape, kind, start = one
    count = math.prod(shape)
    if kind in _PLAIN:
        dtype, block, length = _PLAIN[kind], None, count * _PLAIN[kind].itemsize
    elif kind in _BLOCKS:
        dtype, block, whole = torch.float32, _BLOCKS[kind], BLOCKS[_BLOCKS[kind]]
        if count % whole.values:
            raise ValueError(f"{name} {list(shape)} is no whole number of blocks of {whole.values}")
        length = count // whole.values * whole.size
    else:
        known = ", ".join(["F32", "F16", "BF16", *BLOCKS])
        stored = _UNREAD.get(kind, "which this program does not know")
        raise ValueError(
            f"{name} is of ggml's kind {kind} ({stored}); known are {known}: give another file, or the original"
        )
    if start + length > size:
        raise ValueError(f"{name} (bytes {start} to {start + length}) goes beyond its end ({size}): truncated?")
    return Entry(dtype, shape, start, start + length, block)


def _check_apart(entries: dict[str, Entry]) -> None:
    held = sorted((one.start, one.end, name) for name, one in entries.items() if one.end > one.start)
    for (_, end, before), (start, _, name) in pairwise(held):
        if start < end:
            raise ValueError(f"{name} overlaps {before}")


def _renamed(entries: dict[str, Entry]) -> dict[str, Entry]:
    if not any(name.startswith("enc.blk.") for name in entries):
        return entries
    return {".".join(_OF_T5.get(part, part) for part in name.split(".")): one for name, one in entries.items()}


def _code(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"a value is of the kind {kind}, which is not known")
    return _NUMBERS[kind]
