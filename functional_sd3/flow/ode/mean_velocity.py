"""Steps of a mean velocity: u(x_t, t, r), the mean of the flow's velocity over [r, t], leads from t to r at once.

Geng et al. 2025, "Mean Flows for One-step Generative Modeling", arXiv:2505.13447, equation 12.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core.types import Tree
from functional_sd3.flow.evaluation import evaluate
from functional_sd3.flow.ode.method import Advance, Method, no_carry
from functional_sd3.flow.path import broadcast


# velocity is a `MeanVelocity`, which the type of `Method.step` cannot express.
def mean_velocity_step(velocity: Any, x: Tensor, t: Tensor, t_next: Tensor, carry: Tree) -> Advance:
    """x_r = x_t - (t - r) u(x_t, t, r), from t to r = t_next.

    A step that ascends takes the mean over the same interval, u(x, t_next, t), at its own x: it is the inverse of the
    descending one to first order, and `fixed_point.inverse` is the exact one.
    """
    slope = evaluate(velocity, x, torch.maximum(t, t_next), torch.minimum(t, t_next))
    return Advance(x + broadcast(t_next - t, x) * slope, carry, slope)


MEANFLOW = Method(no_carry, mean_velocity_step, order=1, evaluations=1, name="meanflow", mean=True)
"""Steps of a velocity (x, t, r): exact in any number of them where that is the mean velocity of a flow."""


def ignore_end(velocity: Callable[..., Any]) -> Callable[..., Any]:
    """`velocity(x, t, ...)` called with (x, t, r, ...), for one that is made for the r of its step."""
    return lambda x, t, r, *carry: velocity(x, t, *carry)
