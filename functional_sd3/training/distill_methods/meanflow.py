"""Mean velocities: MeanFlow, improved MeanFlow and shortcut students, which draw in any number of steps."""

from dataclasses import replace
from typing import Any

from functional_sd3.flow import path
from functional_sd3.training.distill_methods.types import DistillMethod, Settings
from functional_sd3.training.objectives import Loss, meanflow_loss, shortcut_loss
from functional_sd3.training.objectives.segments import Teacher
from functional_sd3.transformer import mmdit

INTERVAL_SIZE = 64
"""Inputs of the embedder of t - r that a student has beyond its teacher."""


def with_interval(network: mmdit.Config, settings: Settings) -> mmdit.Config:
    """The network with an embedder of t - r, its teacher's where that has one."""
    return replace(network, interval_size=network.interval_size or INTERVAL_SIZE)


def _meanflow(config: Any, teacher: Teacher, settings: Settings) -> Loss:
    return meanflow_loss(
        config,
        teacher=teacher,
        equal=0.5 if settings.equal is None else settings.equal,
        density=path.uniform,
        shift=settings.shift,
        dtype=settings.dtype,
        attend=settings.attend,
        along="predicted" if settings.method == "imeanflow" else "target",
    )


def _shortcut(config: Any, teacher: Teacher, settings: Settings) -> Loss:
    return shortcut_loss(
        config,
        teacher=teacher,
        equal=0.5 if settings.equal is None else settings.equal,
        density=path.uniform,
        shift=settings.shift,
        dtype=settings.dtype,
        attend=settings.attend,
    )


def _tangent(settings: Settings, update: int) -> dict[str, float]:
    """The factor of du/dt, from 0 to 1 in the first `tangent_warmup` updates."""
    return {"tangent": min(1.0, update / settings.tangent_warmup)} if settings.tangent_warmup else {}


MEANFLOW = DistillMethod("meanflow", _meanflow, network=with_interval, scales=_tangent)
"""MeanFlow with the teacher's velocity in place of the data's (`meanflow_loss`); with the method "imeanflow" improved
MeanFlow."""
SHORTCUT = DistillMethod("meanflow", _shortcut, network=with_interval, takes_average=True)
"""Shortcut models with the teacher's velocity (`shortcut_loss`)."""
