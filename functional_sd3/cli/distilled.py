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
    given = getattr(arguments, "given", ())
    numbers = flow_distilled.numbers_of_steps(levels.distilled_steps, levels.trained_steps)
    listed = " or ".join(map(str, numbers))
    fitting = {"segments": ("euler",), "consistency": ("euler", "euler_renoised")}.get(levels.distillation or "")
    if fitting and method not in (None, *fitting):
        raise ValueError(
            f"--method {method}: this model is a student by {levels.distillation}, whose velocity leads to "
            f"{_LEADS_TO[levels.distillation or '']}: it is drawn by {' or '.join(fitting)}"
        )
    if "steps" in given and arguments.steps > 0:
        flow_distilled.check_steps(levels.distillation, levels.distilled_steps, levels.trained_steps, arguments.steps)
    if "steps" not in given:
        arguments.steps = numbers[0]
    elif arguments.steps not in numbers and levels.distillation == "segments":
        spans = min(number for number in numbers if number % arguments.steps == 0) // arguments.steps
        report.note(
            f"--steps {arguments.steps} of a model distilled for {listed}: each spans {spans} of the steps that it "
            f"learned; distill --to {arguments.steps} makes a student for that"
        )
    elif arguments.steps not in numbers and levels.trained_steps:
        report.note(f"--steps {arguments.steps}: this model was trained to be drawn in {listed} steps")
    folded = levels.guidance_distilled
    if folded and "cfg" not in given:
        arguments.cfg = 1.0
    elif folded and arguments.cfg > 1:
        report.note(f"--cfg {arguments.cfg:g} guides a model that has guidance folded in")
    if not {"steps", "cfg"} <= set(given):
        guided = " and has guidance folded in" if folded else ""
        drawn = f"{arguments.steps} steps, --cfg {arguments.cfg:g}"
        report.note(f"this model was distilled for {listed} steps{guided}: drawn in {drawn}")
