"""Algebraically reversible methods: the state at the start from the state at the end, exact up to rounding.

McCallum and Foster 2024, "Efficient, Accurate and Stable Gradients for Neural ODEs", arXiv:2410.11648, section 3. Two
copies y and z of the state are advanced in turn, each by the step Psi_h(t, x) of any one-step method at the other:

    y' = lambda y + (1 - lambda) z + Psi_h(t, z)        z = z' + Psi_-h(t', y')
    z' = z - Psi_-h(t', y')                             y = (y' - (1 - lambda) z - Psi_h(t, z)) / lambda

The right column is the inverse of the left for any Psi, because it recomputes the same increments. lambda < 1 couples
the copies, which would drift apart otherwise, and makes the pair stable; the inverse multiplies errors by 1 / lambda.
"""

import torch
from torch import Tensor

from functional_sd3.core.types import Tree, Velocity
from functional_sd3.flow.ode.fixed_point import check_one_step
from functional_sd3.flow.ode.method import Advance, Method
from functional_sd3.flow.ode.runge_kutta import MIDPOINT
from functional_sd3.flow.path import broadcast

COUPLING = 0.99


def reversible(base: Method = MIDPOINT, coupling: float = COUPLING) -> tuple[Method, Method]:
    """(forward, inverse): a method of the order of `base` at twice its evaluations, and its inverse.

    `forward` is a method like any other, in either direction of time. The copy z is its carry, {"twin": (batch, ...)}:
    the inverse starts from the state that a run ended in, not from its x alone,
    `ode.run(inverse, velocity, end, times.flip(0))`, and is for that alone: errors that `forward` damps grow by
    1 / lambda a step. coupling: lambda in (0, 1].

    Under vmap, grad and compile as `base`. Raises ValueError for a coupling outside (0, 1] and a multistep base.
    """
    check_one_step(base)
    if not 0 < coupling <= 1:
        raise ValueError(f"coupling {coupling} must be above 0 and at most 1")

    def increment(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        step = base.step(velocity, x, t, t_next, [])
        # A method leaves x as it is in a step of no length, but x - x is not 0 where x is not finite.
        return torch.where(broadcast(t == t_next, x), 0.0, step.x - x), step.slope

    def forward(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, carry: Tree) -> Advance:
        twin = carry["twin"]
        change, slope = increment(velocity, twin, t, t_next)
        x = coupling * x + (1 - coupling) * twin + change
        return Advance(x, {"twin": twin - increment(velocity, x, t_next, t)[0]}, slope)

    def inverse(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, carry: Tree) -> Advance:
        change, slope = increment(velocity, x, t, t_next)
        twin = carry["twin"] + change
        x = (x - (1 - coupling) * twin - increment(velocity, twin, t_next, t)[0]) / coupling
        return Advance(x, {"twin": twin}, slope)

    def init(x: Tensor, t: Tensor) -> Tree:
        return {"twin": x}

    name, cost = f"reversible_{base.name}", 2 * base.evaluations
    return Method(init, forward, base.order, cost, name), Method(init, inverse, base.order, cost, f"{name}_inverse")
