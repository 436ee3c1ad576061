"""Search of a tensor of any float dtype for NaN and infinity, without a copy of it."""

import math

import torch
from torch import Tensor

# Parts that are converted first should stay in a processor's cache; those that are only summed may be long.
_CONVERTED, _SUMMED = 2**18, 2**22
# The largest bit pattern, but for the sign, that is still a number.
_LARGEST_FP8 = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7B}


def nonfinite_kind(value: Tensor) -> str | None:
    """Kind of a non-finite value in the tensor, "NaN" or "an infinity"; None where there is none.

    Copies what is not contiguous.
    """
    if not value.numel():
        return None
    narrow = value.dtype in _LARGEST_FP8 or value.dtype == torch.float16
    for chunk in value.detach().reshape(-1).split(_CONVERTED if narrow else _SUMMED):
        if value.dtype in _LARGEST_FP8:
            if int((chunk.view(torch.uint8) & 0x7F).max()) > _LARGEST_FP8[value.dtype]:
                return _name(chunk.float())
            continue
        # A finite sum has only finite terms, and is faster than looking at each. In float16 most sums would overflow.
        total = float(chunk.sum(dtype=torch.float32 if narrow else None))
        if not math.isfinite(total) and not torch.isfinite(chunk).all():
            return _name(chunk)
    return None


def _name(chunk: Tensor) -> str:
    return "NaN" if chunk.isnan().any() else "an infinity"
