"""Defaults of distilled models: their number of steps, no guidance where it is folded in, methods that fit."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from functional_sd3.cli import report
from functional_sd3.flow import distilled as flow_distilled

if TYPE_CHECKING:
    from functional_sd3.layouts.components import Config


_LEADS_TO = {"segments": "the next time of its own steps", "consistency": "the end of the flow"}


class Given(argparse.Action):
    """Stores a value and, in `given`, that it was given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = {*getattr(namespace, "given", ()), self.dest}


def apply_defaults(arguments: argparse.Namespace, config: "Config") -> None:
    """Set --steps and --cfg of the command line, where they were not given, to those of a distilled model, and say so.

    Raises ValueError for a --method that does not draw such a model.
    """
    levels, method = config.schedule, getattr(arguments, "method", None)
    if method == "meanflow" and not (config.transformer and config.transformer.interval_size):
        raise ValueError(
            "--method meanflow takes steps of a mean velocity u(x, t, r), and this model has none: its config has no "
            "interval_size. distill --method meanflow makes a student that has"
        )
    if levels is None or levels.distilled_steps is None:
        return
    given, steps = getattr(arguments, "given", ()), levels.distilled_steps
    fitting = {"segments": ("euler",), "consistency": ("euler", "euler_renoised")}.get(levels.distillation or "")
    if fitting and method not in (None, *fitting):
        raise ValueError(
            f"--method {method}: this model is a student by {levels.distillation}, whose velocity leads to "
            f"{_LEADS_TO[levels.distillation or '']}: it is drawn by {' or '.join(fitting)}"
        )
    if "steps" in given and arguments.steps > 0:
        flow_distilled.check_steps(levels.distillation, steps, arguments.steps)
    if "steps" not in given:
        arguments.steps = steps
    elif arguments.steps < steps and levels.distillation == "segments":
        spans = steps // arguments.steps
        report.note(
            f"--steps {arguments.steps} of a model distilled for {steps}: each spans {spans} of the steps that it "
            f"learned; distill --to {arguments.steps} makes a student for that"
        )
    folded = levels.guidance_distilled
    if folded and "cfg" not in given:
        arguments.cfg = 1.0
    elif folded and arguments.cfg > 1:
        report.note(f"--cfg {arguments.cfg:g} guides a model that has guidance folded in")
    if not {"steps", "cfg"} <= set(given):
        guided = " and has guidance folded in" if folded else ""
        drawn = f"{arguments.steps} steps, --cfg {arguments.cfg:g}"
        report.note(f"this model was distilled for {steps} steps{guided}: drawn in {drawn}")
