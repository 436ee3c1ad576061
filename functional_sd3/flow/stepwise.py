"""Values that differ from step to step of a run, such as a velocity field, taken by the index of the step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from functional_sd3.core.types import Velocity

Value = TypeVar("Value", covariant=True)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Stepwise(Generic[Value]):
    """One value for each step of a run: `at(step)`, step 0 the first.

    As the velocity of `ode.integrate` and `ode.run`: step i evaluates `at(i)` and no other, at any t.
    """

    at: Callable[[int], Value]

    def after(self, steps: int) -> "Stepwise[Value]":
        """The values from step `steps` on, for a run that resumes there."""
        return Stepwise(lambda step: self.at(steps + step))


RunVelocity = Velocity | Stepwise[Velocity]
"""The velocity of a run: one field for all its steps, or one for each."""


def at_step(value: Item | Stepwise[Item], step: int) -> Item:
    """The value of a step; one that is not `Stepwise` is the same in all."""
    return value.at(step) if isinstance(value, Stepwise) else value


def map_steps(function: Callable[..., Item], *values: Any) -> Item | Stepwise[Item]:
    """`function(*values)`, step by step where one of the values is `Stepwise`."""
    if not any(isinstance(value, Stepwise) for value in values):
        return function(*values)
    return Stepwise(lambda step: function(*(at_step(value, step) for value in values)))
