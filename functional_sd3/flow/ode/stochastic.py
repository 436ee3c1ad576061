"""Stochastic samplers: noise at every step, from keys that the run carries.

    x = integrate(ancestral(prng.key(0)), velocity, noise, schedule.sigmas(28))

The carry holds a key for each sample, from which each step derives its own: a run stays a fold over explicit state,
resumes to the bit, and a sample's noise depends on its key and the step alone. key: (2,), from which sample i takes
`fold_in(key, i)`, or (batch, 2); not the key of the starting noise: `prng.split` it. All but `churn` draw each step
from a Gaussian transition after one evaluation (`transitions`: formulas, sources). A step that ascends draws no noise.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key, Velocity
from functional_sd3.flow.evaluation import evaluate
from functional_sd3.flow.ode import transitions
from functional_sd3.flow.ode.method import Advance, Method, Transition
from functional_sd3.flow.ode.runge_kutta import HEUN
from functional_sd3.flow.ode.transitions import Rule, safe_sqrt
from functional_sd3.flow.path import broadcast


def gaussian(name: str, key: Key, rule: Rule, *, order: int) -> Method:
    """The method whose descending steps are drawn from the transition of a rule; others are Euler's."""

    def transition(x: Tensor, slope: Tensor, t: Tensor, t_next: Tensor) -> Transition:
        descends = t_next < t
        # Other times in steps without noise, so that all is finite there, derivatives too.
        mean, std = rule(x, slope, torch.where(descends, t, 0.75), torch.where(descends, t_next, 0.5))
        euler = x + broadcast(t_next - t, x) * slope
        return Transition(torch.where(broadcast(descends, x), mean, euler), torch.where(descends, std, 0.0))

    def step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, carry: Key) -> Advance:
        slope = evaluate(velocity, x, t)
        carry, noise = draw_noise(carry, x)
        return Advance(transitions.draw(transition(x, slope, t, t_next), noise), carry, slope)

    return Method(carry_keys(key), step, order, evaluations=1, name=name, transition=transition)


def ancestral(key: Key, eta: float | Tensor = 1.0, scale: float | Tensor = 1.0) -> Method:
    """Ancestral Euler: to a level below the next, and noise back up to it: k-diffusion's Euler ancestral, for rectified
    flow.

    To t_d = t_next (1 + eta (t_next / t - 1)) by Euler; then x is multiplied by (1 - t_next) / (1 - t_d) and noise of
    variance t_next^2 - (t_d (1 - t_next) / (1 - t_d))^2 is added, which takes the distribution at t_d to the one at
    t_next. With ever smaller steps it is the SDE with the flow's distributions and the noise 2 eta t / (1 - t) dt.
    eta in [0, 1], 0 is Euler; scale: of the noise. Of order 1 in distribution.
    """
    return gaussian("euler_ancestral", key, transitions.ancestral(eta, scale), order=1)


def renoised(key: Key) -> Method:
    """Renoised Euler: the predicted data, noised to the next level: x_next = (1 - t_next) (x - t v) + t_next noise.

    The step of diffusers' `FlowMatchEulerDiscreteScheduler` with `stochastic_sampling`, and the multistep sampler of
    consistency models (Song et al. 2023, arXiv:2303.01469, algorithm 1). For models distilled to predict the data in
    one step: with others the prediction is a mean, too smooth, and its error does not fall with more steps: its order
    is 0.
    """
    return gaussian("euler_renoised", key, transitions.renoised(), order=0)


def flow_sde(key: Key, a: float | Tensor = 0.7) -> Method:
    """Flow-GRPO's sampler: Euler-Maruyama of the flow's SDE with sigma = a sqrt(t / (1 - t)).

    a >= 0, a number or (); 0 is Euler, to the bit. The last step to t = 0 draws noise too (the paper does not train on
    it): `denoised` of its `StepInfo` has none. Of order 1 in distribution from a start below t = 1; from t = 1, where
    sigma is infinite and the first step takes another, of order 1/2.
    """
    return gaussian("flow_sde", key, transitions.flow_sde(a), order=1)


def dance(key: Key, eta: float | Tensor = 0.3) -> Method:
    """DanceGRPO's sampler: Euler-Maruyama of the flow's SDE with the constant sigma = eta.

    eta >= 0, a number or (); 0 is Euler, to the bit. The last step as that of `flow_sde`. Of order 1 in distribution.
    """
    return gaussian("dance", key, transitions.dance(eta), order=1)


def cps(key: Key, a: float | Tensor = 0.8) -> Method:
    """Coefficients-preserving sampling: sin(a pi / 2) of the noise is new in each step, at the level of the path.

    a in [0, 1], a number or (); 0 is Euler, to the bit, 1 is `renoised`. Each step, however short, replaces this share
    of the noise, so that the error does not fall with more steps: its order is 0. The last step to t = 0 draws none.
    """
    return gaussian("cps", key, transitions.cps(a), order=0)


def churn(
    key: Key,
    gamma: float | Tensor = 0.1,
    lowest: float | Tensor = 0.0,
    highest: float | Tensor = 1.0,
    scale: float | Tensor = 1.0,
    base: Method = HEUN,
) -> Method:
    """Churn: noise before every step, and a step of `base` from the raised noise level. Karras et al. 2022,
    arXiv:2206.00364, algorithm 2, in the variables of the path.

    There sigma = t / (1 - t) is raised to (1 + gamma) sigma, which is t_raised = t (1 + gamma) / (1 + gamma t), and
    x_raised = (x + t sqrt(gamma (2 + gamma)) noise) / (1 + gamma t). gamma >= 0: S_churn / steps of the paper, which
    keeps it below sqrt(2) - 1; in steps from lowest <= t <= highest (S_tmin, S_tmax as times); scale: S_noise.
    base: a one-step method; its order is that in distribution as long as gamma falls like the length of the
    steps. The level raised to is a time that is not of the grid.

    diffusers' `FlowMatchHeunDiscreteScheduler` adds noise of variance t_raised^2 - t^2 for s_churn, without shrinking
    x, and evaluates the model at t instead of t_raised: that leaves the path, and is not kept here.
    """
    one = torch.zeros(1, dtype=torch.float32, device="cpu")
    if base.init(one, one[0]) != []:
        raise ValueError(f"churn takes a one-step method as its base, and {base.name} carries a state")

    def step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, carry: Key) -> Advance:
        carry, noise = draw_noise(carry, x)
        has_noise = (t_next < t) & (lowest <= t) & (t <= highest)
        amount = torch.where(has_noise, torch.as_tensor(gamma, dtype=t.dtype, device=t.device), 0.0)
        raised = t * (1 + amount) / (1 + amount * t)
        std = scale * t * safe_sqrt(amount * (2 + amount))
        start = (x + broadcast(std, x) * noise) / broadcast(1 + amount * t, x)
        x_next, _, slope = base.step(velocity, start, raised, t_next, [])
        # The slope from x to the predicted data, which are start - raised slope.
        prediction = start - broadcast(raised, x) * slope
        from_x = (x - prediction) / broadcast(torch.where(t > 0, t, 1.0), x)
        return Advance(x_next, carry, torch.where(broadcast(t > 0, x), from_x, slope))

    return Method(
        carry_keys(key),
        step,
        order=base.order,
        evaluations=base.evaluations,
        name=f"{base.name}_churn",
        mean=base.mean,
    )


def carry_keys(key: Key) -> Callable[[Tensor, Tensor], Key]:
    """The `init` of a method that carries a key for each sample."""

    def init(x: Tensor, t: Tensor) -> Key:
        return prng.sample_keys(key.to(x.device), len(x))

    return init


def draw_noise(keys: Key, x: Tensor) -> tuple[Key, Tensor]:
    """The keys of the following steps, and noise shaped like x."""
    both = prng.split(keys)
    return both[..., 0, :], prng.normal(both[..., 1, :], x.shape[1:], x.dtype)
