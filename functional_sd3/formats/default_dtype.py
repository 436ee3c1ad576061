"""The dtype of parameters where none is given: one for a component, and one that the device computes well.

Stored uniformly in float32, float64 or bfloat16, and elsewhere than on a CPU in float16, parameters stay as they are
stored. On a CPU everything else becomes float32: float16 takes 4.5 times as long there, float8 and blocks do not
compute, and layers refuse several dtypes. On other devices these become bfloat16, of which the range is float32's.
bfloat16 stays bfloat16 on a CPU: it has kernels there, and float32 would take twice the memory.
"""

from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

import torch

from functional_sd3.formats.notes import note

Kind = torch.dtype | str
"""Storage of a tensor: a dtype, or the name of an encoding that has to be decoded first."""


class Default(NamedTuple):
    """The default dtype of a program: `on_cpu` on a CPU, elsewhere, and where it is None, that of this module.

    advice: kinds that are not kept -> how the program's user chooses another dtype; it ends the Note.
    """

    on_cpu: torch.dtype | None
    advice: Callable[[Collection[Kind]], str]


PYTHON = Default(None, lambda kinds: 'dtype= takes another, and dtype="stored" keeps each')
"""The default of a call that names no dtype."""
Dtype = torch.dtype | Literal["stored"] | Default | None
"""A dtype; "stored" for each parameter's own; None for `PYTHON`; or the default of a program."""
_COMPUTED = (torch.float32, torch.float64, torch.bfloat16)


def choose(dtype: Dtype, kinds: Collection[Kind], device: torch.device | str) -> torch.dtype | None:
    """Dtype of the parameters of a component stored in `kinds`; None: as they are stored."""
    if dtype == "stored":
        return None
    if isinstance(dtype, torch.dtype):
        return dtype
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and isinstance(dtype, Default) and dtype.on_cpu:
        return dtype.on_cpu
    if not kinds:
        return None
    if len(kinds) == 1 and next(iter(kinds)) in (*_COMPUTED, *(() if on_cpu else (torch.float16,))):
        return None
    if not on_cpu:
        return torch.bfloat16
    return torch.float64 if torch.float64 in kinds else torch.float32


def is_default(dtype: Dtype) -> bool:
    """True if the caller leaves the dtype to the device."""
    return dtype is None or isinstance(dtype, Default)


def say(dtype: Dtype, stored: Collection[Collection[Kind]], device: torch.device | str) -> None:
    """One Note for a load by default whose dtypes differ from the stored ones; stored: the kinds of each component."""
    if not is_default(dtype):
        return
    chosen = [(kinds, choose(dtype, kinds, device)) for kinds in stored]
    changed = {kind for kinds, one in chosen for kind in kinds if one not in (None, kind)}
    if changed:
        place = "a CPU" if torch.device(device).type == "cpu" else f"the device {torch.device(device).type}"
        dtypes = _listed({one for kinds, one in chosen if one and changed & set(kinds)})
        advice = (dtype if isinstance(dtype, Default) else PYTHON).advice(changed)
        note(f"weights stored in {_listed(changed)} are loaded in {dtypes}, in which {place} computes well; {advice}")


def check(dtype: Dtype) -> None:
    """Raises ValueError for what is no dtype of parameters."""
    if is_default(dtype) or dtype == "stored" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    raise ValueError(f'dtype {dtype!r} must be a floating one, such as torch.bfloat16, or "stored"')


def _listed(kinds: Collection[Kind]) -> str:
    return " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
