"""Log-probabilities of the steps of stochastic samplers, and of whole trajectories.

    states = integrate(method, velocity, noise, times, save="all")
    log_probs(method, velocity, states, times)                    # (steps, batch)
    runner = with_log_prob(method)                                # records them in its carry while it samples

A step of such a method is x_s = mean + std noise, so p(x_s | x) is N(mean, std^2) in each element, and the
log-probability of a trajectory is the sum over its steps. Flow-GRPO (Liu et al. 2025, arXiv:2505.05470) and its
successors use the mean over the elements, the sum here divided by their number. Everything is differentiable in what
the velocity closes over, and works under vmap and compile.
"""

import torch
from torch import Tensor

from functional_sd3.core.types import Tree, Velocity
from functional_sd3.flow.evaluation import evaluate
from functional_sd3.flow.ode.embedded import Adaptive
from functional_sd3.flow.ode.method import Advance, Method, Transition
from functional_sd3.flow.ode.stochastic import draw_noise
from functional_sd3.flow.ode.transitions import Rule, draw, log_density
from functional_sd3.flow.stepwise import RunVelocity, at_step
from functional_sd3.flow.times import Times, checked


def transition(
    method: Method | Adaptive, velocity: Velocity, x: Tensor, t: Tensor | float, s: Tensor | float
) -> Transition:
    """Mean and standard deviation of a step of the method from x (batch, ...) at t to s, each () or (batch,).

    In float32, or float64 for a float64 x. One evaluation of the velocity; no noise is drawn. Raises ValueError for a
    method whose steps have no such distribution: deterministic ones, and `churn`, which evaluates after its noise.
    """
    rule = _rule(method)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    t, s = (torch.as_tensor(time, dtype=x.dtype, device=x.device) for time in (t, s))
    return rule(x, evaluate(velocity, x, t), t, s)


def log_prob(
    method: Method | Adaptive, velocity: Velocity, x: Tensor, t: Tensor | float, s: Tensor | float, x_s: Tensor
) -> Tensor:
    """log p(x_s | x) of a step from x at t to x_s at s, (batch,): the sum over the elements of a sample.

    0 where the step draws no noise, and so has no density: it adds nothing to a sum, a ratio or a gradient. The rest as
    of `transition`.
    """
    step = transition(method, velocity, x, t, s)
    return log_density(x_s.to(step.mean.dtype), step)


def log_probs(method: Method | Adaptive, velocity: RunVelocity, states: Tensor, times: Times) -> Tensor:
    """Log-probability of each step of a trajectory, (steps, batch), as in `log_prob`.

    states (steps + 1, batch, ...) at times (steps + 1,) or (steps + 1, batch), of `ode.integrate(..., save="all")`; for
    those of the method's own run equal to what `with_log_prob` records, to the bit. Raises ValueError for another
    number of states, and as `transition` does.
    """
    _rule(method)
    grid = checked(times, states[0])
    if len(states) != len(grid):
        raise ValueError(f"{len(states)} states at {len(grid)} times; there is one state for each time")
    steps = zip(grid[:-1].unbind(), grid[1:].unbind(), states[:-1].unbind(), states[1:].unbind(), strict=True)
    return torch.stack(
        [log_prob(method, at_step(velocity, step), x, t, s, x_s) for step, (t, s, x, x_s) in enumerate(steps)]
    )


def with_log_prob(method: Method) -> Method:
    """The method, whose carry is {"method": its own carry, "log_prob": (batch,) of the last step, as in `log_prob`}.

    For any run, such as `pipeline.sample` with an `on_step` that keeps `info.state.carry["log_prob"]`. The samples are
    equal to the bit, and there are no further evaluations. Raises ValueError as `transition` does.
    """
    rule = _rule(method)

    def init(x: Tensor, t: Tensor) -> Tree:
        return {"method": method.init(x, t), "log_prob": x.new_zeros(len(x))}

    def step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, carry: Tree) -> Advance:
        slope = evaluate(velocity, x, t)
        keys, noise = draw_noise(carry["method"], x)
        distribution = rule(x, slope, t, t_next)
        x_next = draw(distribution, noise)
        return Advance(x_next, {"method": keys, "log_prob": log_density(x_next, distribution)}, slope)

    return method._replace(init=init, step=step)


def _rule(method: Method | Adaptive) -> Rule:
    if isinstance(method, Adaptive) or method.transition is None:
        raise ValueError(
            f"{method.name} has no transition density: it draws no noise, or evaluates the velocity after it; "
            "ode.ancestral, renoised, flow_sde, cps and dance have one"
        )
    return method.transition
