"""Whether a tensor holds NaN or infinity, of any float dtype, without a copy of it."""

import torch
from torch import Tensor

# Small enough that the intermediate results stay in a processor's cache.
_CHUNK = 2**18
# The largest bit pattern, but for the sign, that is still a number.
_LARGEST_FP8 = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7B}


def stranger(value: Tensor) -> str | None:
    """What a tensor holds besides finite values, "NaN" or "an infinity", else None. Copies what is not contiguous."""
    if not value.numel():
        return None
    for chunk in value.detach().reshape(-1).split(_CHUNK):
        if value.dtype in _LARGEST_FP8:
            if int((chunk.view(torch.uint8) & 0x7F).max()) > _LARGEST_FP8[value.dtype]:
                return _name(chunk.float())
        # A finite sum has only finite terms, and is faster than looking at each.
        elif not torch.isfinite(chunk.sum()) and not torch.isfinite(chunk).all():
            return _name(chunk)
    return None


def _name(chunk: Tensor) -> str:
    return "NaN" if chunk.isnan().any() else "an infinity"
