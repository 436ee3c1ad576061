"""Types of the methods of distillation, and their hyperparameters."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from functional_sd3.flow import schedule
from functional_sd3.layouts.components import Config
from functional_sd3.training import distill_options
from functional_sd3.training.objectives import Loss
from functional_sd3.training.objectives.segments import Teacher
from functional_sd3.training.update_rule import UpdateRule
from functional_sd3.transformer import mmdit


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of a run.

    to: steps that the student draws in. method: a name of `distill_methods.METHODS`. cfg: guidance scale of the
    teacher, which is folded in; 1 for none. shift: of the student's grid, `schedule.even(to, shift)`. rate, warmup,
    ema, decay, clip, accumulate, dtype: as in `tasks.Settings`. lora: rank of a LoRA that is trained instead of the
    transformer. teacher_dtype: of the teacher's computation, None for that of the model's parameters. rule: optimiser.

    attend: as in `mmdit.apply`, of the student and its teacher. The others are of some methods alone, None for the
    method's default: described in `distill_options.OPTIONS`.
    """

    to: int
    method: str = "segments"
    batch: int = 48
    cfg: float = 5.0
    shift: float = 3.0
    rate: float = 2e-4
    warmup: int = 20
    ema: float = 0.98
    decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    lora: int = 0
    dtype: torch.dtype | None = None
    teacher_dtype: torch.dtype | None = None
    rule: UpdateRule = UpdateRule()
    attend: mmdit.AttendBlocks | None = None
    inner: int | None = None
    equal: float | None = None
    tangent_warmup: int | None = None
    log_variance: bool | None = None
    fake_updates: int | None = None
    fake_rate: float | None = None
    teacher_steps: int | None = None


def unchanged(network: mmdit.Config, settings: Settings) -> mmdit.Config:
    """The student is the network of its teacher."""
    return network


def no_scales(settings: Settings, update: int) -> dict[str, float]:
    """Nothing changes from update to update."""
    return {}


def from_teacher(levels: schedule.Config, settings: Settings) -> Settings:
    """The settings as they are: the teacher is no student yet, or one of the same kind."""
    return settings


class DistillMethod(NamedTuple):
    """Method of distillation: loss, teacher and differences of the student's model.

    kind: `distillation` of its scheduler config (`flow.distilled.KINDS`), by which it is drawn. loss: (the
    student's config, teacher, settings) -> objective of batches {"latents", "context", "pooled"}. network: the
    student's transformer, from the teacher's; parameters that it has beyond those of the teacher are initialised as
    its `spec` says. settings: (the teacher's scheduler config, settings) -> those for this teacher; ValueError,
    beginning with the setting, where it cannot be distilled so. scales: (settings, update, 0 the first) -> numbers
    that its batch has by name, (batch,), such as a warmup's. fake_score: (the student's config, settings) ->
    objective of a fake score, for methods that have one (`training.fake_score`). takes_average: the objective takes
    the average of the parameters too, under the name `shortcut.AVERAGE`. has_pairs: the batches hold "noise" too,
    and latents that the teacher drew from it (`training.reflow`).
    """

    kind: str
    loss: Callable[[Config, Teacher, Settings], Loss]
    network: Callable[[mmdit.Config, Settings], mmdit.Config] = unchanged
    settings: Callable[[schedule.Config, Settings], Settings] = from_teacher
    scales: Callable[[Settings, int], dict[str, float]] = no_scales
    fake_score: Callable[[Config, Settings], Loss] | None = None
    takes_average: bool = False
    has_pairs: bool = False


def with_defaults(settings: Settings) -> Settings:
    """The settings with the defaults of their method. Raises ValueError for settings of other methods alone."""
    method = settings.method
    given = {name: getattr(settings, name) for name in distill_options.OPTIONS}
    for name in distill_options.foreign(method, given):
        owners = distill_options.listed(list(distill_options.OPTIONS[name].defaults))
        raise ValueError(f"{name} is for method {owners}, not for {method}")
    defaults = distill_options.own_defaults(method)
    return replace(settings, **{name: value for name, value in defaults.items() if given[name] is None})


def has_state_of(first: DistillMethod, second: DistillMethod) -> bool:
    """True if the states of two methods have the same tensors, without options that add some."""
    return first.network is second.network and (first.fake_score is None) == (second.fake_score is None)
