"""An integrator of the flow as a value: two functions and two numbers, as in optax.

A method is stateless. All that a run carries from step to step is its `State`, a tree of tensors: it can be saved,
resumed, branched, vmapped and differentiated.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from functional_sd3.core.types import Tree, Velocity


class Advance(NamedTuple):
    """Result of one step."""

    x: Tensor
    carry: Tree
    slope: Tensor
    """The velocity at the start of the step, in the dtype of x; `path.denoised` of it is the predicted data."""


class Transition(NamedTuple):
    """Normal distribution of the state after a step, x_s = mean + std noise."""

    mean: Tensor
    """(batch, ...)"""
    std: Tensor
    """() or (batch,); 0 where the step draws no noise."""


class Method(NamedTuple):
    """An integrator of dx/dt = velocity(x, t) over a given grid."""

    init: Callable[[Tensor, Tensor], Tree]
    """`init(x, t)` -> carry: a tensor, or dicts and lists of tensors, [] for none."""
    step: Callable[[Velocity, Tensor, Tensor, Tensor, Tree], Advance]
    """`step(velocity, x, t, t_next, carry)` -> Advance. t, t_next scalar or (batch,), in either direction of
    time; a step of no length (t_next = t) leaves x as it is."""
    order: int
    """p: twice as many steps divide the error at the end by 2^p."""
    evaluations: int
    """Calls of the velocity in a usual step; `ode.evaluations` counts those of a whole run."""
    name: str
    last: "Method | None" = None
    """The method of the last step of a grid, where that differs."""
    transition: Callable[[Tensor, Tensor, Tensor, Tensor], Transition] | None = None
    """`transition(x, slope, t, t_next)` -> the distribution of a step, where that is a mean and noise; None for others.
    See `ode.transition` and `ode.log_prob`."""
    mean: bool = False
    """True if the method evaluates a mean velocity, `velocity(x, t, r)` (`MeanVelocity`), instead of one of a time."""


class State(NamedTuple):
    """State of a run: x (batch, ...) at time t, scalar or (batch,), and the method's carry."""

    x: Tensor
    t: Tensor
    carry: Tree


class StepInfo(NamedTuple):
    """Argument of a callback after each step."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    """0 after the first step."""
    steps: int
    state: State
    """After the step."""
    denoised: Tensor
    """The prediction of the data that the step started from: x_0 = x - t v."""

    @property
    def x(self) -> Tensor:
        return self.state.x

    @property
    def t(self) -> Tensor:
        return self.state.t


def no_carry(x: Tensor, t: Tensor) -> list[Tree]:
    """The carry of a one-step method, and of a multistep method before its first step."""
    return []
