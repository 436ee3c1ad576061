"""Weights in blocks of a few bits each, as GGUF files keep them: bytes in, float32 out.

Of every block one or two factors are stored in float16 beside small whole numbers; in the kinds whose name ends in K,
blocks of 256 hold 8 or 16 smaller ones with factors of their own, themselves whole numbers. The formats are those of
ggml (`ggml-quants.c`); the results are, to the bit, those of its Python package.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Blocks that are decoded together: their intermediate results stay small beside the weight.
_AT_ONCE = 2**15


class Blocks(NamedTuple):
    """`values` numbers in `size` bytes; `decode`: bytes (blocks, size), uint8 -> numbers (blocks, values), float32."""

    values: int
    size: int
    decode: Callable[[Tensor], Tensor]


def decode(kind: str, content: Tensor) -> Tensor:
    """The values, float32 (n,), of whole blocks of `kind`; content: their bytes, uint8."""
    count, size, one = BLOCKS[kind]
    rows = content.reshape(-1, size)
    # Named dtypes and devices: a caller's defaults must change nothing here.
    values = torch.empty(len(rows), count, dtype=torch.float32, device=content.device)
    for start in range(0, len(rows), _AT_ONCE):
        values[start : start + _AT_ONCE] = one(rows[start : start + _AT_ONCE])
    return values.flatten()


def _q4_0(rows: Tensor) -> Tensor:
    return _halves(rows, 2) * (_nibbles(rows[:, 2:]).float() - 8.0)


def _q4_1(rows: Tensor) -> Tensor:
    return _halves(rows, 4)[:, :1] * _nibbles(rows[:, 4:]) + _halves(rows, 4)[:, 1:]


def _q5_0(rows: Tensor) -> Tensor:
    return _halves(rows, 2) * ((_nibbles(rows[:, 6:]) | _fifth_bits(rows[:, 2:6])).float() - 16.0)


def _q5_1(rows: Tensor) -> Tensor:
    units = _nibbles(rows[:, 8:]) | _fifth_bits(rows[:, 4:8])
    return _halves(rows, 4)[:, :1] * units + _halves(rows, 4)[:, 1:]


def _q8_0(rows: Tensor) -> Tensor:
    return _halves(rows, 2) * rows[:, 2:].view(torch.int8).float()


def _q2_k(rows: Tensor) -> Tensor:
    scales, units, both = rows[:, :16], _quarters(rows[:, 16:80]), _halves(rows[:, 80:], 4)
    scale = both[:, :1] * (scales & 0xF)
    least = both[:, 1:] * (scales >> 4)
    return (scale[..., None] * units.unflatten(1, (16, 16)) - least[..., None]).flatten(1)


def _q3_k(rows: Tensor) -> Tensor:
    high, low, packed, factor = rows[:, :32], _quarters(rows[:, 32:96]), rows[:, 96:108], _halves(rows[:, 108:], 2)
    # Six bits each: four below, in the first eight bytes, and two above, in the last four.
    below = torch.cat([packed[:, :8] & 0xF, packed[:, :8] >> 4], dim=1)
    scales = below | (_shifted(packed[:, 8:], 0, 2, 4, 6) & 3) << 4
    absent = (_shifted(high, *range(8)) & 1) ^ 1
    units = low.to(torch.int8) - (absent << 2).to(torch.int8)
    scale = factor * (scales.to(torch.int8) - 32)
    return (scale[..., None] * units.unflatten(1, (16, 16))).flatten(1)


def _q4_k(rows: Tensor) -> Tensor:
    return _with_least(rows, _pairs(rows[:, 16:]))


def _q5_k(rows: Tensor) -> Tensor:
    return _with_least(rows, _pairs(rows[:, 48:]) | (_shifted(rows[:, 16:48], *range(8)) & 1) << 4)


def _q6_k(rows: Tensor) -> Tensor:
    low = torch.cat([_shifted(half, 0, 4) & 0xF for half in rows[:, :128].split(64, dim=1)], dim=1)
    units = (low | _quarters(rows[:, 128:192]) << 4).to(torch.int8) - 32
    scale = _halves(rows[:, 208:], 2) * rows[:, 192:208].view(torch.int8)
    return (scale[..., None] * units.unflatten(1, (16, 16))).flatten(1)


def _iq4_nl(rows: Tensor) -> Tensor:
    return _halves(rows, 2) * _levels(_nibbles(rows[:, 2:]))


def _iq4_xs(rows: Tensor) -> Tensor:
    # Of eight scales four bits lie in four bytes, two a byte, and two in two bytes, four a byte.
    low = torch.stack([rows[:, 4:8] >> place for place in (0, 4)], dim=2).flatten(1) & 0xF
    high = torch.stack([rows[:, 2:4] >> place for place in (0, 2, 4, 6)], dim=2).flatten(1) & 3
    scale = _halves(rows, 2) * ((low | high << 4).to(torch.int8) - 32)
    units = torch.cat([_nibbles(part) for part in rows[:, 8:].split(16, dim=1)], dim=1)
    return (scale[..., None] * _levels(units).unflatten(1, (8, 32))).flatten(1)


def _levels(units: Tensor) -> Tensor:
    """Table of the 16 non-uniform levels of IQ4 blocks, float32."""
    return torch.tensor(_LEVELS, dtype=torch.float32, device=units.device)[units.long()]


def _with_least(rows: Tensor, units: Tensor) -> Tensor:
    """Blocks of 32 with a factor and a least value each, of which both are six bits."""
    both, packed = _halves(rows, 4), rows[:, 4:16]
    first, second, third = packed.split(4, dim=1)
    scales = torch.cat([first & 0x3F, (third & 0xF) | (first >> 6) << 4], dim=1)
    leasts = torch.cat([second & 0x3F, (third >> 4) | (second >> 6) << 4], dim=1)
    scale, least = both[:, :1] * scales, both[:, 1:] * leasts
    return (scale[..., None] * units.unflatten(1, (8, 32)) - least[..., None]).flatten(1)


def _halves(rows: Tensor, size: int) -> Tensor:
    """The float16 numbers in the first `size` bytes, as float32."""
    return rows[:, :size].contiguous().view(torch.float16).float()


def _nibbles(rows: Tensor) -> Tensor:
    """The lower four bits of all bytes, then the upper four of all."""
    return _shifted(rows, 0, 4) & 0xF


def _pairs(rows: Tensor) -> Tensor:
    """The nibbles of 32 bytes at a time, in the order of `_nibbles`."""
    return torch.cat([_nibbles(part) for part in rows.split(32, dim=1)], dim=1)


def _quarters(rows: Tensor) -> Tensor:
    """The two lowest bits of all bytes, then the next two, and so on, of 32 bytes at a time."""
    return torch.cat([_shifted(part, 0, 2, 4, 6) & 3 for part in rows.split(32, dim=1)], dim=1)


def _fifth_bits(rows: Tensor) -> Tensor:
    """A bit of four bytes for each of 32 values, where the fifth of their bits is."""
    each = torch.arange(8, dtype=torch.uint8, device=rows.device)
    return ((rows[..., None] >> each) & 1).flatten(1) << 4


def _shifted(rows: Tensor, *places: int) -> Tensor:
    return torch.cat([rows >> place for place in places], dim=1)


_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""`kvalues_iq4nl` of ggml."""
BLOCKS = {
    "Q4_0": Blocks(32, 18, _q4_0),
    "Q4_1": Blocks(32, 20, _q4_1),
    "Q5_0": Blocks(32, 22, _q5_0),
    "Q5_1": Blocks(32, 24, _q5_1),
    "Q8_0": Blocks(32, 34, _q8_0),
    "Q2_K": Blocks(256, 84, _q2_k),
    "Q3_K": Blocks(256, 110, _q3_k),
    "Q4_K": Blocks(256, 144, _q4_k),
    "Q5_K": Blocks(256, 176, _q5_k),
    "Q6_K": Blocks(256, 210, _q6_k),
    "IQ4_NL": Blocks(32, 18, _iq4_nl),
    "IQ4_XS": Blocks(256, 136, _iq4_xs),
}
"""Kind, as ggml calls it -> its blocks."""
