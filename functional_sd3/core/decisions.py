"""Decisions by values, sample by sample, that save work where all samples of a batch agree."""

from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.dispatch import is_concrete


class Decided(NamedTuple):
    """What is known of a condition (batch,) on the host."""

    any: bool
    """False if it holds for no sample."""
    all: bool
    """True if it holds for every sample."""


NONE = Decided(False, False)


def read(condition: Tensor) -> Decided:
    """Whether the condition holds for some and for all samples, which waits for the device; where it cannot be read
    (vmap, compile, the capture of a CUDA graph) it may hold for any, and not for all: take it by `torch.where`."""
    capturing = condition.is_cuda and torch.cuda.is_current_stream_capturing()
    if type(condition) is not Tensor or not is_concrete(condition) or capturing:
        return Decided(True, False)
    some, every = torch.stack([condition.any(), condition.all()]).tolist()
    return Decided(some, every)
