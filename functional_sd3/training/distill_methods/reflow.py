"""Reflow students: the velocity on straight lines between noise and the end of the teacher's flow from it."""

from typing import Any

from functional_sd3.flow import path
from functional_sd3.training.distill_methods.types import DistillMethod, Settings
from functional_sd3.training.objectives import Loss, flow_loss
from functional_sd3.training.objectives.segments import Teacher


def _loss(config: Any, teacher: Teacher, settings: Settings) -> Loss:
    """The teacher has drawn the batches' pairs, and is not evaluated again."""
    return flow_loss(config, density=path.uniform, shift=settings.shift, dtype=settings.dtype, attend=settings.attend)


REFLOW = DistillMethod("reflow", _loss, has_pairs=True)
"""Flow matching on pairs that the teacher drew (`training.reflow`)."""
