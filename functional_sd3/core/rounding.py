"""Stochastic rounding to bfloat16: the expected value of the rounded number is the number itself.

Gupta et al. 2015, "Deep learning with limited numerical precision", equation 3. Updates that are smaller than half a
unit in the last place of a weight are lost by rounding to nearest, and only rarely applied, but then whole, by this.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key

_KEPT = -(1 << 16)
"""Mask of the 16 bits of a float32 that bfloat16 has."""


Positions = Callable[[Tensor], Tensor]
"""Flat positions in a part of a leaf -> those in the whole, int64."""


class LeafRounding(NamedTuple):
    """The key by which a leaf is rounded, and where in the whole a part of it is; None for a whole leaf."""

    key: Key
    positions: Positions | None = None


class Rounding(NamedTuple):
    """The key by which the leaves of a tree are rounded; positions: of those that are parts, by path."""

    key: Key
    positions: Mapping[str, Positions] = {}

    def leaf(self, number: int, path: str) -> LeafRounding:
        """Rounding of leaf `number` of the tree, which is at `path`."""
        return LeafRounding(prng.fold_in(self.key, number), self.positions.get(path))


def as_rounding(key: "Key | Rounding") -> Rounding:
    """The rounding of a tree of whole leaves by this key; a `Rounding` as it is."""
    return key if isinstance(key, Rounding) else Rounding(key)


def stochastic_bfloat16(key: Key, values: Tensor, start: int = 0, positions: Positions | None = None) -> Tensor:
    """float32 values -> bfloat16, up or down with probabilities of which the mean is the value: exactly so, as the 16
    bits that are dropped are compared with 16 random ones.

    start: number of the first value, where `values` is a part of a tensor that is rounded in parts: value i is rounded
    by element `start + i` of `prng.bits(key, ...)`. positions: where these numbers are in a whole of which the tensor
    is a part, which is then rounded as the whole is. Infinities and NaN stay.
    """
    counter = torch.arange(start, start + values.numel(), dtype=torch.int64, device=values.device)
    counter = counter if positions is None else positions(counter)
    words = key.to(values.device, torch.int32)
    first, second = prng.threefry(words[0], words[1], counter.to(torch.int32), (counter >> 32).to(torch.int32))
    return round_by(values, (first ^ second).reshape(values.shape))


def round_by(values: Tensor, words: Tensor) -> Tensor:
    """float32 values rounded to bfloat16, away from zero where the 16 bits that are dropped and the lower 16 of the
    random word, int32, carry over."""
    raised = (values.contiguous().view(torch.int32) + (words & 0xFFFF)) & _KEPT
    return torch.where(values.isfinite(), raised.view(torch.float32), values).to(torch.bfloat16)
