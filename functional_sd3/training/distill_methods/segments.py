"""Segments: each step of the student learns a few of its teacher, on the teacher's own grid."""

from dataclasses import replace
from typing import Any

from functional_sd3.flow import distilled, schedule
from functional_sd3.training.distill_methods.types import DistillMethod, Settings
from functional_sd3.training.objectives import Loss, segments_loss
from functional_sd3.training.objectives.segments import Teacher


def _loss(config: Any, teacher: Teacher, settings: Settings) -> Loss:
    inner = settings.inner or 1
    times = schedule.even(settings.to * inner, settings.shift)
    return segments_loss(config, teacher, times, inner=inner, dtype=settings.dtype, attend=settings.attend)


def _settings(levels: schedule.Config, settings: Settings) -> Settings:
    """A student of segments keeps its grid and is followed step by step; `to` must divide its number of steps."""
    if levels.distilled_steps is None or levels.distillation != "segments":
        return settings
    count = max(distilled.numbers_of_steps(levels.distilled_steps, levels.trained_steps))
    inner, rest = divmod(count, settings.to)
    if rest or inner < 2:
        fewer = [str(number) for number in range(1, count) if count % number == 0]
        can = f"that can become one of {' or '.join(fewer)}" if fewer else "that cannot be fewer"
        raise ValueError(
            f"to {settings.to}: this model is a student of {count} segments, {can}; for {settings.to} distil the model "
            "that it learned from"
        )
    return replace(settings, inner=inner, shift=levels.shift)


SEGMENTS = DistillMethod("segments", _loss, settings=_settings)
"""Progressive distillation (`segments_loss`)."""
