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


def check_flow(config: "Config", what: str) -> None:
    """Raises ValueError where the model's velocity is not that of a flow at one time; what: whose need of it it is."""
    kind = config.schedule.distillation if config.schedule else None
    if kind in _LEADS_TO:
        raise ValueError(
            f"{what} the velocity of a flow, and this model is a student by {kind}, whose velocity leads to "
            f"{_LEADS_TO[kind]}: give --params the model that it learned from"
        )


def check_training(config: "Config") -> None:
    """Raises ValueError for a student, which the objective of `train` would make neither a student nor a flow."""
    kind = config.schedule.distillation if config.schedule else None
    if kind not in (None, "reflow"):
        raise ValueError(
            f"train teaches the velocity of the flow at every time, and --params is a student by {kind}, whose "
            "velocity is another: train the model that it learned from and distill that, or a --lora of that model, "
            "with which the student can be drawn; reward trains students by segments and by consistency"
        )


def reward_defaults(arguments: argparse.Namespace, config: "Config") -> argparse.Namespace:
    """--sampling-steps and --sampler of `reward` where they were not given: a distilled model's own.

    Raises ValueError where they do not draw such a model, and for a mean velocity.
    """
    levels, steps, sampler = config.schedule, arguments.sampling_steps, arguments.sampler
    kind = levels.distillation if levels else None
    if kind == "meanflow":
        raise ValueError(
            "reward trains a velocity of one time, and --params is a student by meanflow, which is drawn by its mean "
            "velocity u(x, t, r): reward the model that it learned from, and distill that"
        )
    if sampler is not None:
        _check_method("sampler", sampler, config)
    if steps is not None:
        _check_steps("sampling-steps", steps, config)
    if levels is not None and levels.guidance_distilled and arguments.cfg > 1:
        report.note(f"--cfg {arguments.cfg:g} guides a model that has guidance folded in")
    own = {"steps": levels.distilled_steps or 8, "renoises": levels.stochastic_sampling} if levels else {"steps": 8}
    # The forms of grpo and draft have steps of their own.
    renoises = own.get("renoises") and arguments.method not in ("grpo", "draft")
    chosen = {
        "sampling_steps": steps or own["steps"],
        "sampler": sampler or ("euler_renoised" if renoises else "euler"),
    }
    return argparse.Namespace(**{**vars(arguments), **chosen})


def _check_method(option: str, name: str | None, config: "Config") -> None:
    """Raises ValueError where an integrator would evaluate a student where it was not trained."""
    kind = config.schedule.distillation if config.schedule else None
    fitting = {"segments": ("euler",), "consistency": ("euler", "euler_renoised")}.get(kind or "")
    if fitting and name not in (None, *fitting):
        raise ValueError(
            f"--{option} {name}: this model is a student by {kind}, whose velocity leads to "
            f"{_LEADS_TO[kind or '']}: it is drawn by {' or '.join(fitting)}"
        )


def _check_steps(option: str, steps: int, config: "Config") -> None:
    levels = config.schedule
    try:
        if levels is not None and levels.distilled_steps is not None:
            flow_distilled.check_steps(levels.distillation, levels.distilled_steps, levels.trained_steps, steps)
    except ValueError as error:
        raise ValueError(f"--{option} {str(error).removeprefix('steps ')}") from None


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
    if getattr(arguments, "measures_flow", False):
        check_flow(config, "likelihood follows")
        return
    if getattr(arguments, "inverts", False) and levels.distillation == "consistency":
        check_flow(config, "edit goes to noise and back along")
    given = getattr(arguments, "given", ())
    numbers = flow_distilled.numbers_of_steps(levels.distilled_steps, levels.trained_steps)
    listed = " or ".join(map(str, numbers))
    _check_method("method", method, config)
    if "steps" in given and arguments.steps > 0:
        _check_steps("steps", arguments.steps, config)
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
        chosen = f"{arguments.steps} steps, --cfg {arguments.cfg:g}"
        report.note(f"this model was distilled for {listed} steps{guided}: drawn in {chosen}")
