"""Explicit Runge-Kutta methods: Butcher tableaus, and the one step function that reads them.

Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", section II.1. The velocity may have any
float dtype; sums are in the dtype of x.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from functional_sd3.core.types import Tree, Velocity
from functional_sd3.flow.evaluation import evaluate
from functional_sd3.flow.ode.method import Advance, Method, no_carry
from functional_sd3.flow.path import broadcast


class Tableau(NamedTuple):
    """Nodes c, strictly lower triangular matrix a (row i has i entries) and weights b, one of each per stage."""

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


def stages(
    tableau: Tableau, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, first: Tensor | None = None
) -> list[Tensor]:
    """Slopes k_i = v(x + h sum_j a_ij k_j, t + c_i h), h = t_next - t. first: k_1, if already known."""
    h = t_next - t
    slopes: list[Tensor] = [] if first is None else [first]
    for node, row in list(zip(tableau.nodes, tableau.matrix, strict=True))[len(slopes) :]:
        # t_next itself: t + 1 h equals it only up to rounding.
        time = t if node == 0 else t_next if node == 1 else t + node * h
        at = x + broadcast(h, x) * combine(row, slopes) if any(row) else x
        slopes.append(evaluate(velocity, at, time))
    return slopes


def combine(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """sum_i weights_i slopes_i, over the weights that are not zero (one at least)."""
    terms = [slope if weight == 1 else weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]
    return sum(terms[1:], terms[0])


def explicit(name: str, order: int, tableau: Tableau) -> Method:
    """Explicit Runge-Kutta method of a tableau."""

    def step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, carry: Tree) -> Advance:
        slopes = stages(tableau, velocity, x, t, t_next)
        return Advance(x + broadcast(t_next - t, x) * combine(tableau.weights, slopes), carry, slopes[0])

    return Method(no_carry, step, order=order, evaluations=len(tableau.nodes), name=name)


def second_order(alpha: float) -> Tableau:
    """The family of two-stage tableaus of order 2, with their second stage at t + alpha h."""
    return Tableau((0.0, alpha), ((), (alpha,)), (1 - 1 / (2 * alpha), 1 / (2 * alpha)))


EULER = explicit("euler", 1, Tableau((0.0,), ((),), (1.0,)))
"""x + h v(x, t): what released models are sampled with."""

MIDPOINT = explicit("midpoint", 2, second_order(1 / 2))

HEUN = explicit("heun", 2, second_order(1.0))
"""The trapezoidal rule on an Euler step. Two evaluations at every step, the last of them at the end of the grid."""

HEUN_EDM = HEUN._replace(name="heun_edm", last=EULER)
"""Heun with an Euler step for the last interval, so that the model is never evaluated at t = 0: 2 n - 1 evaluations.

Karras et al. 2022, arXiv:2206.00364, algorithm 1; what diffusers' `FlowMatchHeunDiscreteScheduler` does. For grids
that descend to 0. Still of order 2, for one step of local error h^2.
"""

RALSTON = explicit("ralston", 2, second_order(2 / 3))
"""The two-stage method with the least bound on its local error (Ralston 1962)."""

RK4 = explicit(
    "rk4", 4, Tableau((0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
)
"""Kutta's classical method."""
