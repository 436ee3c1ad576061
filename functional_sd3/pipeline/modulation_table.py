"""Modulations of a run, computed once for all its times, and the row of each evaluation.

The modulations of every block depend on t and the pooled vector alone, and a third of a transformer's weights is used
for nothing else: computed at once they are read once an image instead of once a step.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Tree
from functional_sd3.flow.path import broadcast
from functional_sd3.flow.times import is_readable


class Table(NamedTuple):
    """Modulations of a batch at the times of a step, or at any others that are known beforehand."""

    times: Tensor
    """(rows, 1), or (rows, batch) where each sample has its own."""
    modulations: Tree
    """Leaves (rows, batch, ...), as `mmdit.modulations` returns them for such times."""


class Row(NamedTuple):
    """Modulations at one time."""

    modulations: Tree
    """Leaves (batch, ...)."""
    is_valid: Tensor | None
    """(1,) or (batch,): False where the table lacks the time; None where that was checked."""


def split_steps(table: Table, times: Sequence[Tensor]) -> list[Table]:
    """The parts of a table that belong to the times of each step."""
    stops = list(accumulate(len(each) for each in times))
    return [
        tree.map(lambda leaf, rows=slice(first, stop): leaf[rows], table)
        for first, stop in zip([0, *stops], stops, strict=False)
    ]


def concat_batches(tables: Sequence[Table]) -> Table:
    """The tables of several batches at the same times as that of their concatenation."""
    if len(tables) == 1:
        return tables[0]
    times = tables[0].times
    modulations = tree.map(lambda *leaves: torch.cat(leaves, 1), *(table.modulations for table in tables))
    return Table(times if times.shape[1] == 1 else times.repeat(1, len(tables)), modulations)


def lookup(table: Table, t: Tensor) -> Row:
    """The row at t, () or (batch,): that of the nearest time, if it is t up to rounding.

    Compiled arithmetic may round the time of a stage differently, so the row is not chosen by equality; and by tensors,
    so that no value is read from a device. Where values can be read another t raises ValueError; elsewhere the row is
    not valid there, and `mask_invalid` makes the velocity NaN.
    """
    times, at = table.times.detach(), t.detach().reshape(1, -1)
    distance = (times - at).abs()
    is_valid = distance.amin(0) <= _rounding(times, at)
    readable = is_readable(is_valid)
    if readable and not is_valid.all():
        raise ValueError(
            f"the velocity is evaluated at t = {t.tolist()}, which is not among the {len(times)} times that it was "
            "made for; pass times=None for any t"
        )
    return Row(_rows_at(table.modulations, distance), None if readable else is_valid)


def mask_invalid(velocity: Tensor, row: Row) -> Tensor:
    """The velocity (batch, ...), NaN for the samples whose row is not valid."""
    return velocity if row.is_valid is None else torch.where(broadcast(row.is_valid, velocity), velocity, torch.nan)


def _rows_at(modulations: Tree, distance: Tensor) -> Tree:
    if len(distance) == 1:
        return tree.map(lambda leaf: leaf[0], modulations)
    nearest = distance.argmin(0)
    if len(nearest) == 1:
        return tree.map(lambda leaf: leaf.index_select(0, nearest).squeeze(0), modulations)
    samples = torch.arange(len(nearest), dtype=torch.int64, device=nearest.device)
    return tree.map(lambda leaf: leaf[nearest, samples], modulations)


def _rounding(times: Tensor, t: Tensor) -> Tensor:
    """Largest difference of two roundings of one time of a step, (1,) or (batch,)."""
    dtype = torch.float64 if times.dtype == t.dtype == torch.float64 else torch.float32
    return 4 * torch.finfo(dtype).eps * times.abs().amax(0)
