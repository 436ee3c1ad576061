"""Multistep methods: one evaluation a step, and their order from the values of earlier steps.

The carry lists the values of the last steps and their times, newest first: empty at the start, longer by one a step
until it is full. Its length is known on the host, so nothing is read from the device.
"""

import torch
from torch import Tensor

from functional_sd3.core.types import Velocity
from functional_sd3.flow.evaluation import evaluate
from functional_sd3.flow.ode.method import Advance, Method, no_carry
from functional_sd3.flow.ode.polynomial import integral
from functional_sd3.flow.ode.runge_kutta import EULER, MIDPOINT, RK4
from functional_sd3.flow.path import broadcast

History = list[dict[str, Tensor]]
"""Each {"value": (batch, ...), "t": scalar or (batch,)}."""


def dpmpp_2m_step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, carry: History) -> Advance:
    """DPM-Solver++(2M) in k-diffusion's form, with lambda = -log t.

    With D = x - t v, h = lambda_next - lambda and D' = D + (h / 2 h_last) (D - D_last):
    x_next = (t_next / t) x + (1 - t_next / t) D'. It is written here as the Euler step along v - (D' - D) / t, which is
    equal and has no special case at t = 0. The first step has D' = D, and so has one from or to 0, lambda being
    infinite there: a grid that ends at 0 ends with x = D.
    """
    slope = evaluate(velocity, x, t)
    prediction = x - broadcast(t, x) * slope
    history = [{"value": prediction, "t": t}]
    if not carry:
        return Advance(x + broadcast(t_next - t, x) * slope, history, slope)
    last, t_last = carry[0]["value"], carry[0]["t"]
    finite = (t > 0) & (t_next > 0) & (t_last > 0) & (t_last != t)
    # Where lambda is infinite the logarithms have other, finite arguments, so that their derivatives are finite too.
    before, here, after = (torch.where(finite, time, safe) for time, safe in ((t_last, 2.0), (t, 1.0), (t_next, 1.0)))
    ratio = (torch.log(here) - torch.log(after)) / (torch.log(before) - torch.log(here))
    correction = broadcast(ratio / (2 * here), x) * (prediction - last)
    return Advance(x + broadcast(t_next - t, x) * (slope - correction), history, slope)


DPMPP_2M = Method(no_carry, dpmpp_2m_step, order=2, evaluations=1, name="dpmpp_2m")
"""Lu et al. 2022, arXiv:2211.01095, algorithm 2; the sampler of Stability's reference for all but the turbo model."""


def adams_bashforth(order: int, starter: Method) -> Method:
    """x + the integral over the step of the polynomial through the last `order` velocities, on any grid.

    Hairer, Norsett, Wanner I, section III.5, in Newton's form. The first order - 1 steps are the starter's, whose own
    order must be at least order - 1 for a global error of this order.
    """

    def step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, carry: History) -> Advance:
        if len(carry) < order - 1:
            x_next, _, slope = starter.step(velocity, x, t, t_next, [])
            return Advance(x_next, [{"value": slope, "t": t}, *carry], slope)
        slope = evaluate(velocity, x, t)
        points = [{"value": slope, "t": t}, *carry]
        return Advance(x + _integral(points, t_next, x), points[:-1], slope)

    return Method(no_carry, step, order, evaluations=1, name=f"adams_bashforth_{order}")


AB2 = adams_bashforth(2, EULER)
AB3 = adams_bashforth(3, MIDPOINT)
AB4 = adams_bashforth(4, RK4)


def _integral(points: History, t_next: Tensor, x: Tensor) -> Tensor:
    """Integral of the polynomial through the points, from the time of the first one to t_next."""
    t = points[0]["t"]
    moments = [(t_next - t) ** (power + 1) / (power + 1) for power in range(len(points))]
    return integral([point["value"] for point in points], [point["t"] - t for point in points], moments, x)
