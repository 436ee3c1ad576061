"""The dtype of parameters where none is given: one for a component, and one that the device computes well.

Stored uniformly in float32, float64 or bfloat16, and elsewhere than on a CPU in float16, parameters stay as they are
stored. On a CPU everything else becomes float32: float16 takes 4.5 times as long there, float8 and blocks do not
compute, and layers refuse several dtypes. On other devices these become bfloat16, of which the range is float32's.
bfloat16 stays bfloat16 on a CPU: it has kernels there, and float32 would take twice the memory.
"""

from collections.abc import Collection
from typing import Literal

import torch

from functional_sd3.formats.notes import note

Dtype = torch.dtype | Literal["stored"] | None
"""A dtype; "stored" for each parameter's own; None for the default of the device."""
Kind = torch.dtype | str
"""Storage of a tensor: a dtype, or the name of an encoding that has to be decoded first."""
_COMPUTED = (torch.float32, torch.float64, torch.bfloat16)


def choose(dtype: Dtype, kinds: Collection[Kind], device: torch.device | str) -> torch.dtype | None:
    """Dtype of the parameters of a component stored in `kinds`; None: as they are stored."""
    if dtype == "stored":
        return None
    if dtype is not None or not kinds:
        return dtype
    on_cpu = torch.device(device).type == "cpu"
    if len(kinds) == 1 and next(iter(kinds)) in (*_COMPUTED, *(() if on_cpu else (torch.float16,))):
        return None
    if not on_cpu:
        return torch.bfloat16
    return torch.float64 if torch.float64 in kinds else torch.float32


def say(changed: Collection[Kind], chosen: Collection[torch.dtype], device: torch.device | str) -> None:
    """One Note for a load whose defaults differ from what is stored; none where nothing changed."""
    if changed:
        place = "a CPU" if torch.device(device).type == "cpu" else f"the device {torch.device(device).type}"
        note(
            f"weights stored in {_listed(changed)} are loaded in {_listed(chosen)}, in which {place} computes well; "
            'dtype= takes another, and dtype="stored" keeps each'
        )


def check(dtype: Dtype) -> None:
    """Raise ValueError for what is no dtype of parameters."""
    if dtype is None or dtype == "stored" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    raise ValueError(f'dtype {dtype!r} must be a floating one, such as torch.bfloat16, or "stored"')


def _listed(kinds: Collection[Kind]) -> str:
    return " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
