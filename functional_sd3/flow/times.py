"""Time grids of a run, checked where their values can be read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from functional_sd3.core.dispatch import is_concrete

Times = Tensor | Sequence[float]


def checked(times: Times, x: Tensor) -> Tensor:
    """`times` on the device of x and in the dtype of its state: (n + 1,) or (n + 1, batch).

    Raises ValueError for the wrong shape and, where the values are readable, for times that are not monotone or leave
    [0, 1].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    grid = times if isinstance(times, Tensor) else torch.as_tensor(times, dtype=dtype, device="cpu")
    if grid.ndim not in (1, 2) or len(grid) < 2 or (grid.ndim == 2 and grid.shape[1:] != x.shape[:1]):
        raise ValueError(
            f"times have shape {tuple(grid.shape)}; they must be (steps + 1,) or (steps + 1, batch), "
            f"with at least one step{'' if x.ndim == 0 else f' and batch {x.shape[0]}'}"
        )
    if is_readable(grid):
        _check(grid)
    return grid.to(dtype=dtype, device=x.device)


def is_readable(values: Tensor) -> bool:
    """True if values can be read without waiting for a device or breaking a trace."""
    return type(values) is Tensor and values.device.type == "cpu" and is_concrete(values)


def _check(grid: Tensor) -> None:
    if not ((grid >= 0) & (grid <= 1)).all():
        worst = grid.flatten()[(grid.flatten() - 0.5).abs().nan_to_num(nan=torch.inf).argmax()]
        raise ValueError(f"times leave [0, 1] (there is a {worst:.6g}); 1 is noise, 0 is data")
    lengths = grid.diff(dim=0)
    if not ((lengths <= 0).all(0) | (lengths >= 0).all(0)).all():
        raise ValueError(f"times {grid.flatten().tolist()} are not monotone: they must descend, or ascend, all the way")
