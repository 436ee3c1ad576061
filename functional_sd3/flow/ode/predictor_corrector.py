"""UniPC, a predictor-corrector method without additional evaluations.

Zhao et al. 2023, arXiv:2302.04867, algorithms 5 and 6 in the prediction of the data, with B(h) = e^h - 1.
"""

import torch
from torch import Tensor

from functional_sd3.core.types import Tree, Velocity
from functional_sd3.flow.evaluation import evaluate
from functional_sd3.flow.ode.method import Advance, Method, no_carry
from functional_sd3.flow.ode.multistep import History
from functional_sd3.flow.ode.polynomial import integral
from functional_sd3.flow.path import broadcast

EDGE = 1e-6
"""lambda is infinite at t = 0 and 1: times are clamped to this distance from them, as diffusers does at 1."""


def unipc(order: int = 2) -> Method:
    """UniPC-p, p = `order` in 1, 2, 3, over lambda = log((1 - t) / t).

    With D = x - t v, x_next = (t_next / t) x + t_next (the integral of e^lambda D). The predictor integrates the
    polynomial through the last p values of D. When the velocity at its result is known, the corrector repeats the same
    step with that D too, and the next step starts from there: no evaluation is repeated, and the last state of a run is
    a prediction. Two values have the weight one half, the paper's simplification for p = 2 (predictor) and 1
    (corrector). The first step is Euler's, and so is one to or from t = 0. A run's order is p + 1 on grids that keep
    away from t = 1, where lambda is infinite, and 2 on those that start there.

    The steps of diffusers' `UniPCMultistepScheduler` (use_flow_sigmas, flow_prediction, bh2) on the same sigmas. It
    evaluates the model at times cut to whole thousandths and begins at 1 - 1e-6; for p = 3 with `lower_order_final` it
    takes the step before the last with p = 2.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order {order} of UniPC must be 1, 2 or 3")

    def step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, carry: Tree) -> Advance:
        slope = evaluate(velocity, x, t)
        here = {"value": x - broadcast(t, x) * slope, "t": t}
        start, points = x, [here]
        if carry:
            history = carry["history"]
            start = _corrected(carry["x"], history, here, x)
            points = [here, *history][:order]
        # (t_next / t) start + (1 - t_next / t) D, with no special case at t = 0.
        change = broadcast(torch.where(t > 0, (t_next - t) / torch.where(t > 0, t, 1.0), 0.0), x) * (start - x)
        x_next = start + change + broadcast(t_next - t, x) * slope
        return Advance(x_next + _correction(points, t_next, x), {"x": start, "history": points}, slope)

    name = "unipc" if order == 2 else f"unipc_{order}"
    return Method(no_carry, step, order=min(order + 1, 2), evaluations=1, name=name)


UNIPC = unipc(2)


def _corrected(x: Tensor, history: History, here: dict[str, Tensor], predicted: Tensor) -> Tensor:
    """Corrector: the step from x at the time of history[0] to `here`, with the value there; `predicted` where it has no
    finite lambda."""
    last, t = history[0]["t"], here["t"]
    usable = (last > 0) & (t > 0) & (t != last)
    ratio = t / torch.where(last > 0, last, 1.0)
    line = broadcast(ratio, x) * x + broadcast(1 - ratio, x) * history[0]["value"]
    corrected = line + _correction([history[0], here, *history[1:]], t, x)
    return torch.where(broadcast(usable, x), corrected, predicted)


def _correction(points: History, t_next: Tensor, x: Tensor) -> Tensor:
    """Difference of the step on the polynomial through the points from that on the first point's value alone, from its
    time to t_next."""
    if len(points) == 1:
        return torch.zeros_like(x)
    t = points[0]["t"]
    is_regular = (t > 0) & (t_next > 0) & (t != t_next)
    # Other, finite arguments elsewhere, so that the derivatives are finite too.
    here, after = torch.where(is_regular, t, 0.5), torch.where(is_regular, t_next, 0.25)
    h = _lambda_difference(here, after)
    nodes = [torch.zeros_like(h), *(_lambda_difference(here, point["t"]) / h for point in points[1:])]
    moments = [1 - after / here]
    for power in range(1, len(points)):
        moments.append(1 - after - power / h * moments[-1])
    if len(points) == 2:
        moments[1] = moments[0] / 2
    first = points[0]["value"]
    correction = integral([torch.zeros_like(x), *(point["value"] - first for point in points[1:])], nodes, moments, x)
    return torch.where(broadcast(is_regular, x), correction, 0.0)


def _lambda_difference(t: Tensor, other: Tensor) -> Tensor:
    """lambda(other) - lambda(t), to the precision of the difference of the times."""
    t, other = t.clamp(EDGE, 1 - EDGE), other.clamp(EDGE, 1 - EDGE)
    return torch.log1p((t - other) / other) + torch.log1p((t - other) / (1 - t))
