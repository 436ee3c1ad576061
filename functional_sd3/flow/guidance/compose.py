"""Guidance as a value: the velocities it needs at a point, and how it combines them.

A `Guidance` holds no tensors of a run and evaluates nothing: `guidance.guided` makes a velocity of it. Here are its
parts and combinators; `literature` has the guidances of the papers.
"""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.sequences import equal_runs
from functional_sd3.core.types import Tree
from functional_sd3.flow.guidance.combine import add_difference
from functional_sd3.flow.guidance.windows import Window
from functional_sd3.flow.ode.method import no_carry
from functional_sd3.flow.times import is_readable

Scale = float | Tensor | Callable[[Tensor], Tensor]
"""A number, a tensor () or (batch,), or a function of t that gives one (`per_step`)."""

Velocities = Mapping[str, Tensor]
"""Velocities at one point by name, each (batch, ...)."""


class Branch(NamedTuple):
    """A velocity that guidance needs: its conditioning, network options and network."""

    conditioning: Any = "positive"
    """"positive" or "negative" for the run's conditioning of that name, or a conditioning (batch or 1, ...)."""
    options: tuple[tuple[str, Any], ...] = ()
    """Options of the network: (("skip_layers", (7, 8, 9)),)."""
    model: Any = None
    """(params, config) of another network; None for the run's own."""


class Call(NamedTuple):
    """The call that makes a guidance: a function of `flow.guidance`, by its name, and its arguments."""

    function: str
    arguments: Mapping[str, Any]


class Guidance(NamedTuple):
    """The branches that a guidance needs, and the function that combines their velocities."""

    needs: dict[str, Branch]
    """Branches by name. Those that differ only in their conditioning are evaluated in one batch."""
    combine: Callable[[Velocities, Tensor, Tensor, Tree], tuple[Tensor, Tree]]
    """`combine(velocities, x, t, carry)` -> the velocity and the carry after it. The velocities may hold more than it
    needs."""
    init: Callable[[Tensor, Tensor], Tree] = no_carry
    """`init(x, t)` -> the carry before the first evaluation."""
    windows: tuple[Window, ...] = ()
    """Step windows of its terms: between the steps where one starts or ends, `at` gives the same."""
    at: Callable[[int, int], "Guidance"] | None = None
    """`at(step, steps)` -> the guidance of that step, which has no windows; None where it is the same in all."""
    made_by: Call | None = None
    """The call that made it, for records of a run (`recorded`); None for a guidance of one's own."""


POSITIVE, NEGATIVE = Branch(), Branch("negative")

CONDITIONAL = Guidance(
    {"positive": POSITIVE},
    lambda velocities, x, t, carry: (velocities["positive"], carry),
    made_by=Call("cfg", {"scale": 1.0}),
)
"""The velocity of the prompt, unguided."""

ZERO = Guidance({}, lambda velocities, x, t, carry: (torch.zeros_like(x), carry), made_by=Call("ZERO", {}))
"""Velocity zero, without an evaluation."""


def pairwise(combine: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Guidance:
    """The guidance `combine(negative, positive, x, t)` of these two velocities."""

    def combine_pair(velocities: Velocities, x: Tensor, t: Tensor, carry: Tree) -> tuple[Tensor, Tree]:
        return combine(velocities["negative"], velocities["positive"], x, t), carry

    # In this order they are evaluated in one batch.
    return Guidance({"negative": NEGATIVE, "positive": POSITIVE}, combine_pair)


def map_velocity(
    guidance: Guidance, needs: Mapping[str, Branch], change: Callable[[Tensor, Velocities, Tensor], Tensor]
) -> Guidance:
    """The guidance whose velocity is `change(v, velocities, t)`, v being that of `guidance`."""

    def combine(velocities: Velocities, x: Tensor, t: Tensor, carry: Tree) -> tuple[Tensor, Tree]:
        v, carry = guidance.combine(velocities, x, t, carry)
        return change(v, velocities, t), carry

    def change_at(step: int, steps: int) -> Guidance:
        return map_velocity(at(guidance, step, steps), needs, change)

    at_step = None if guidance.at is None else change_at
    return Guidance(joined(guidance.needs, needs), combine, guidance.init, guidance.windows, at_step)


def plus(guidance: Guidance, scale: Scale, end: Mapping[str, Branch], start: Mapping[str, Branch]) -> Guidance:
    """v + scale (v_end - v_start), v being that of `guidance`; end and start are one branch each, {"name": Branch}."""
    check_scale(scale)
    ((end_name, _),), ((start_name, _),) = end.items(), start.items()

    def change(v: Tensor, velocities: Velocities, t: Tensor) -> Tensor:
        return add_difference(v, velocities[start_name], velocities[end_name], value(scale, t))

    return map_velocity(guidance, {**start, **end}, change)


def windowed(inside: Guidance, outside: Guidance, window: Window) -> Guidance:
    """One guidance in the steps inside a window, and another outside it.

    Both carry one carry through the run, which one of them may leave as it is. Raises ValueError where they carry
    different states.
    """
    inits = {one.init for one in (inside, outside)} - {no_carry}
    if len(inits) > 1:
        raise ValueError("the guidances inside and outside of a window carry different states; one state at most")
    return Guidance(
        joined(inside.needs, outside.needs),
        _unresolved,
        inits.pop() if inits else no_carry,
        tuple(dict.fromkeys((*inside.windows, *outside.windows, window))),
        lambda step, steps: at(inside if window(step, steps) else outside, step, steps),
    )


def at(guidance: Guidance, step: int, steps: int) -> Guidance:
    """The guidance of step `step` of `steps`, without the terms whose windows exclude it."""
    return guidance if guidance.at is None else guidance.at(step, steps)


def segments(guidance: Guidance, steps: int) -> list[tuple[int, int, Guidance]]:
    """Parts (first step, step after the last, guidance of these steps) of a run of `steps`, in order."""
    inside = [tuple(window(step, steps) for window in guidance.windows) for step in range(steps)]
    return [(first, stop, at(guidance, first, steps)) for first, stop in equal_runs(inside)]


def value(scale: Scale, t: Tensor) -> float | Tensor:
    """The scale at time t: a number, or a tensor () or (batch,)."""
    return scale(t) if callable(scale) else scale


def check_scale(scale: Scale, name: str = "guidance scale") -> None:
    """Raises ValueError for a scale that is not finite, where its value can be read, or is no number at all."""
    if isinstance(scale, Tensor):
        if scale.is_complex() or scale.dtype == torch.bool:
            raise ValueError(f"{name} of dtype {scale.dtype} must be a number; 1 is no guidance")
        if is_readable(scale) and not scale.isfinite().all():
            raise ValueError(f"{name} {scale.tolist()} must be finite; 1 is no guidance")
    elif not callable(scale) and (not isinstance(scale, Real) or isinstance(scale, bool) or not math.isfinite(scale)):
        raise ValueError(f"{name} {scale!r} must be a finite number, a tensor or a function of t; 1 is no guidance")


def is_one(scale: Scale) -> bool:
    """True if a scale is Python's 1, which needs no value of a tensor."""
    return not isinstance(scale, Tensor) and scale == 1


def joined(first: Mapping[str, Branch], second: Mapping[str, Branch]) -> dict[str, Branch]:
    """The branches of both. Raises ValueError where one name is that of two branches."""
    for name in first.keys() & second.keys():
        if not _same(first[name], second[name]):
            raise ValueError(f"this guidance would need two velocities by the name {name!r}")
    return {**first, **second}


def same_model(first: Branch, second: Branch) -> bool:
    """True if two branches have the same network, by identity."""
    models = (first.model or (None, None), second.model or (None, None))
    return all(one is other for one, other in zip(*models, strict=True))


def _same(first: Branch, second: Branch) -> bool:
    named = isinstance(first.conditioning, str) and isinstance(second.conditioning, str)
    same = first.conditioning == second.conditioning if named else first.conditioning is second.conditioning
    return same and first.options == second.options and same_model(first, second)


def _unresolved(velocities: Velocities, x: Tensor, t: Tensor, carry: Tree) -> tuple[Tensor, Tree]:
    raise ValueError(
        "this guidance changes from step to step: take that of a step with `guidance.at(guidance, step, steps)`, or "
        "leave the run to `pipeline.sample`"
    )
