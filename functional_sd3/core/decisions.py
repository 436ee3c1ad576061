"""Decisions by values, sample by sample, that save work where all samples of a batch agree."""

from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.dispatch import is_concrete


class Decision(NamedTuple):
    """Values of a condition (batch,) as far as the host knows them."""

    any: bool
    """False if it holds for no sample."""
    all: bool
    """True if it holds for every sample."""


NONE = Decision(False, False)


def read(condition: Tensor) -> Decision:
    """The condition (batch,) read on the host, which waits for the device.

    Where it cannot be read (vmap, compile, the capture of a CUDA graph) the result is (any=True, all=False), so that
    the caller computes both sides and selects by `torch.where`.
    """
    capturing = condition.is_cuda and torch.cuda.is_current_stream_capturing()
    if type(condition) is not Tensor or not is_concrete(condition) or capturing:
        return Decision(True, False)
    some, every = torch.stack([condition.any(), condition.all()]).tolist()
    return Decision(some, every)
