"""Blockwise dynamic quantisation to 8 bits, for the moments of optimisers.

Dettmers et al. 2022, "8-bit optimizers via block-wise quantization" (arXiv:2110.02861), sections 1.3 and 2: a tensor is
cut into blocks, each divided by its largest magnitude, and every quotient stored as the index of the nearest of 256
levels, which lie denser towards zero.

Blocks lie within the rows of a matrix where these are long enough, so that parts of its rows, on several processes,
have the blocks of the whole.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from functional_sd3.core.types import Tree

BLOCK = 256
"""Numbers in a block, as in the current code of the paper's authors (2,048 in the paper)."""
MIN_BLOCK = 64
"""Least numbers in a block of a row; of rows without such a divisor blocks are of `BLOCK` numbers across rows."""


def row_block(shape: Sequence[int]) -> int | None:
    """Numbers in a block of a row of a leaf, the largest divisor up to `BLOCK`; None where blocks are across rows."""
    row = math.prod(shape[1:])
    fitting = [size for size in range(MIN_BLOCK, BLOCK + 1) if row % size == 0]
    return max(fitting, default=None) if len(shape) > 1 else None


def scale_shape(shape: Sequence[int], block: int | None) -> tuple[int, ...]:
    """Shape of the scales of a leaf, or of a part of its rows: (rows, blocks a row), or (blocks,) across rows."""
    if block is None:
        return (-(-math.prod(shape) // BLOCK),)
    return shape[0], math.prod(shape[1:]) // block


def block_of(stored: Tree) -> int:
    """Numbers in a block of a stored leaf."""
    codes, scale = stored["codes"], stored["scale"]
    return BLOCK if scale.ndim == 1 else codes.shape[1:].numel() // scale.shape[1]


def levels(*, signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 256 levels of dynamic quantisation, float32, ascending, from -1 (unsigned: 0) to 1.

    A level is 10^-e times a fraction; of the 7 bits after the sign (8 without one) e are zeros, one ends them, and the
    rest divides [0.1, 1] evenly, whose middles are the fractions. Beside these there are 0 and 1.
    """
    return torch.tensor(_SIGNED if signed else _UNSIGNED, dtype=torch.float32, device=device)


def _levels(signed: bool) -> list[float]:
    positive = []
    for exponent in range(7):
        count = 2 ** (6 - exponent + (not signed))
        positive += [(0.1 + 0.9 * (index + 0.5) / count) * 10.0**-exponent for index in range(count)]
    return sorted([*positive, *([-level for level in positive] if signed else []), 0.0, 1.0])


_SIGNED, _UNSIGNED = _levels(True), _levels(False)


def quantize(values: Tensor, *, signed: bool, block: int = BLOCK) -> Tree:
    """float32 values (n,) -> {"codes": uint8 (n,), "scale": float32 (blocks,)}; the last block may be shorter.

    Without a sign, values that are not zero never become zero: the quotient of a mean and the root of a square that
    was lost would be without bound.
    """
    table = levels(signed=signed, device=values.device)
    rows = _blocks(values, block)
    scale = rows.abs().amax(1)
    units = rows / torch.where(scale > 0, scale, 1.0)[:, None]
    codes = torch.bucketize(units, (table[1:] + table[:-1]) / 2, out_int32=True)
    if not signed:
        codes = torch.where((codes == 0) & (units > 0), 1, codes)
    return {"codes": codes.to(torch.uint8).flatten()[: len(values)], "scale": scale}


def dequantize(stored: Tree, *, signed: bool, block: int = BLOCK) -> Tensor:
    """float32 (n,) of what `quantize` returns."""
    codes, scale = stored["codes"], stored["scale"]
    units = levels(signed=signed, device=codes.device)[codes.int()]
    return (_blocks(units, block) * scale[:, None]).flatten()[: len(codes)]


def zeros(shape: Sequence[int], block: int | None, *, signed: bool, device: torch.device) -> Tree:
    """Stored zeros for a leaf of a shape: codes of that shape, and scales (`scale_shape`)."""
    zero = (_SIGNED if signed else _UNSIGNED).index(0.0)
    return {
        "codes": torch.full(tuple(shape), zero, dtype=torch.uint8, device=device),
        "scale": torch.zeros(scale_shape(shape, block), dtype=torch.float32, device=device),
    }


def _blocks(values: Tensor, block: int) -> Tensor:
    """(n,) -> (blocks, block), the last one filled with zeros."""
    return torch.nn.functional.pad(values, (0, -len(values) % block)).reshape(-1, block)
