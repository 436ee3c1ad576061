"""Blockwise dynamic quantisation to 8 bits, for the moments of optimisers.

Dettmers et al. 2022, "8-bit optimizers via block-wise quantization" (arXiv:2110.02861), sections 1.3 and 2: a tensor is
cut into blocks, each divided by its largest magnitude, and every quotient stored as the index of the nearest of 256
levels, which lie denser towards zero.
"""

import torch
from torch import Tensor

from functional_sd3.core.types import Tree

BLOCK = 256
"""Numbers in a block, as in the current code of the paper's authors (2,048 in the paper)."""


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


def quantize(values: Tensor, *, signed: bool) -> Tree:
    """float32 values (n,) -> {"codes": uint8 (n,), "scale": float32 (blocks,)}; the last block may be shorter.

    Without a sign, values that are not zero never become zero: the quotient of a mean and the root of a square that
    was lost would be without bound.
    """
    table = levels(signed=signed, device=values.device)
    rows = _blocks(values)
    scale = rows.abs().amax(1)
    units = rows / torch.where(scale > 0, scale, 1.0)[:, None]
    codes = torch.bucketize(units, (table[1:] + table[:-1]) / 2, out_int32=True)
    if not signed:
        codes = torch.where((codes == 0) & (units > 0), 1, codes)
    return {"codes": codes.to(torch.uint8).flatten()[: len(values)], "scale": scale}


def dequantize(stored: Tree, *, signed: bool) -> Tensor:
    """float32 (n,) of what `quantize` returns."""
    codes, scale = stored["codes"], stored["scale"]
    units = levels(signed=signed, device=codes.device)[codes.int()]
    return (_blocks(units) * scale[:, None]).flatten()[: len(codes)]


def zeros(shape: torch.Size, *, signed: bool, device: torch.device) -> Tree:
    """Stored zeros for a tensor of a shape: codes of that shape, and scales of the blocks of its numbers in order."""
    zero = (_SIGNED if signed else _UNSIGNED).index(0.0)
    count = -(-shape.numel() // BLOCK)
    return {
        "codes": torch.full(shape, zero, dtype=torch.uint8, device=device),
        "scale": torch.zeros(count, dtype=torch.float32, device=device),
    }


def _blocks(values: Tensor) -> Tensor:
    """(n,) -> (blocks, BLOCK), the last one filled with zeros."""
    return torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).reshape(-1, BLOCK)
