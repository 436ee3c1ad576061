"""Consistency students (sCM, rCM), whose velocity leads to the end of the teacher's flow from any time."""

from typing import Any

from functional_sd3.flow import schedule
from functional_sd3.training.distill_methods.types import DistillMethod, Settings
from functional_sd3.training.objectives import Loss, fake_score_loss, rcm_loss, scm_loss
from functional_sd3.training.objectives.segments import Teacher


def _scm(config: Any, teacher: Teacher, settings: Settings) -> Loss:
    return scm_loss(config, teacher, dtype=settings.dtype, attend=settings.attend)


def _rcm(config: Any, teacher: Teacher, settings: Settings) -> Loss:
    times = schedule.even(settings.to, settings.shift)
    return rcm_loss(config, teacher, times, dtype=settings.dtype, attend=settings.attend)


def _fake_score(config: Any, settings: Settings) -> Loss:
    times = schedule.even(settings.to, settings.shift)
    return fake_score_loss(config, times, dtype=settings.dtype, attend=settings.attend)


def _settings(levels: schedule.Config, settings: Settings) -> Settings:
    if levels.distillation == "consistency":
        raise ValueError(
            "this model is a student by consistency, whose velocity leads to the end of a flow and is not its own: "
            "distil the model that it learned from"
        )
    return settings


def _tangent(settings: Settings, update: int) -> dict[str, float]:
    """rho of the tangent, from 0 to 1 in the first `tangent_warmup` updates."""
    return {"tangent": min(1.0, update / settings.tangent_warmup)} if settings.tangent_warmup else {}


SCM = DistillMethod("consistency", _scm, settings=_settings, scales=_tangent)
"""Consistency models of continuous time (`scm_loss`)."""
RCM = DistillMethod("consistency", _rcm, settings=_settings, scales=_tangent, fake_score=_fake_score)
"""The same with distribution matching (`rcm_loss`); numbers of updates and the ratio of the rates as in its code."""
