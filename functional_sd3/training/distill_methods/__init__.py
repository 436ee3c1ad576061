"""Methods of distillation: objective, network and kind of the student."""

from functional_sd3.training.distill_methods.consistency import RCM, SCM
from functional_sd3.training.distill_methods.meanflow import MEANFLOW, SHORTCUT
from functional_sd3.training.distill_methods.reflow import REFLOW
from functional_sd3.training.distill_methods.segments import SEGMENTS
from functional_sd3.training.distill_methods.types import DistillMethod, Settings, has_state_of, with_defaults

METHODS: dict[str, DistillMethod] = {
    "segments": SEGMENTS,
    "meanflow": MEANFLOW,
    "imeanflow": MEANFLOW,
    "shortcut": SHORTCUT,
    "scm": SCM,
    "rcm": RCM,
    "reflow": REFLOW,
}
"""Methods by name; `distill_options.METHODS` has the same names."""

__all__ = ["METHODS", "DistillMethod", "Settings", "has_state_of", "with_defaults"]
