"""Stochastic samplers: noise at every step, from keys that the run carries.

    x = integrate(ancestral(prng.key(0)), velocity, noise, schedule.sigmas(28))

The carry holds a key for each sample, from which each step derives its own: a run stays a fold over explicit state,
resumes to the bit, and a sample's noise depends on its key and the step alone. For grids that
descend; an ascending step draws nothing. Do not reuse the key of the starting noise: `prng.split` it.
"""

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key, Velocity
from functional_sd3.flow.ode.method import Advance, Method
from functional_sd3.flow.ode.runge_kutta import HEUN
from functional_sd3.flow.path import broadcast, interpolate


def ancestral(key: Key, eta: float | Tensor = 1.0, scale: float | Tensor = 1.0) -> Method:
    """Ancestral Euler: to a level below the next, and noise back up to it: k-diffusion's Euler ancestral, for rectified
    flow.

    To t_d = t_next (1 + eta (t_next / t - 1)) by Euler; then x is multiplied by (1 - t_next) / (1 - t_d) and noise of
    variance t_next^2 - (t_d (1 - t_next) / (1 - t_d))^2 is added, which takes the distribution at t_d to the one at
    t_next. With ever smaller steps it is the SDE with the flow's distributions and the noise 2 eta t / (1 - t) dt.
    key: (2,), from which sample i takes `fold_in(key, i)`, or (batch, 2). eta in [0, 1], 0 is Euler; scale: of the
    noise. Of order 1 in distribution, one evaluation a step.
    """

    def step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, carry: Key) -> Advance:
        slope = velocity(x, t).to(x.dtype)
        carry, noise = _draw(carry, x)
        descends = (t_next < t) & (t_next > 0)
        # Where nothing is drawn the square root takes another argument, so that its derivative is finite too.
        here, after = torch.where(descends, t, 0.75), torch.where(descends, t_next, 0.5)
        down = after * (1 + eta * (after / here - 1))
        kept = (1 - after) / (1 - down)
        added = _root(after**2 - (kept * down) ** 2)
        to = torch.where(descends, down, t_next)
        kept, added = torch.where(descends, kept, 1.0), torch.where(descends, added, 0.0)
        x_next = broadcast(kept, x) * (x + broadcast(to - t, x) * slope) + broadcast(scale * added, x) * noise
        return Advance(x_next, carry, slope)

    return Method(_keys(key), step, order=1, evaluations=1, name="euler_ancestral")


def renoised(key: Key) -> Method:
    """Euler with fresh noise: to the predicted data, then to the next level: x_next = (1 - t_next) (x - t v) + t_next
    noise.

    What diffusers' `FlowMatchEulerDiscreteScheduler` does with `stochastic_sampling`, and the sampler of latent
    consistency models. For models distilled to predict the data in one step: with others the prediction is a mean,
    too smooth, and more steps do not bring the flow's distribution, so its order is 0. One evaluation a step.
    """

    def step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, carry: Key) -> Advance:
        slope = velocity(x, t).to(x.dtype)
        carry, noise = _draw(carry, x)
        drawn = interpolate(x - broadcast(t, x) * slope, noise, t_next)
        plain = x + broadcast(t_next - t, x) * slope
        return Advance(torch.where(broadcast(t_next < t, x), drawn, plain), carry, slope)

    return Method(_keys(key), step, order=0, evaluations=1, name="euler_renoised")


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
    keeps it below sqrt(2) - 1; drawn where lowest <= t <= highest (S_tmin, S_tmax as times); scale: S_noise.
    base: a one-step method; its order is that in distribution as long as gamma falls like the length of the
    steps. The level raised to is a time that is not of the grid.

    diffusers' `FlowMatchHeunDiscreteScheduler` adds noise of variance t_raised^2 - t^2 for s_churn, without shrinking
    x, and evaluates the model at t instead of t_raised: that leaves the path, and is not kept here.
    """
    one = torch.zeros(1, dtype=torch.float32, device="cpu")
    if base.init(one, one[0]) != []:
        raise ValueError(f"churn takes a one-step method as its base, and {base.name} carries a state")

    def step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, carry: Key) -> Advance:
        carry, noise = _draw(carry, x)
        drawn = (t_next < t) & (lowest <= t) & (t <= highest)
        amount = torch.where(drawn, torch.as_tensor(gamma, dtype=t.dtype, device=t.device), 0.0)
        raised = t * (1 + amount) / (1 + amount * t)
        added = scale * t * _root(amount * (2 + amount))
        start = (x + broadcast(added, x) * noise) / broadcast(1 + amount * t, x)
        x_next, _, slope = base.step(velocity, start, raised, t_next, [])
        # The data that the step aims at, seen from where x was: x - t slope = start - raised slope'.
        aim = start - broadcast(raised, x) * slope
        seen = torch.where(broadcast(t > 0, x), (x - aim) / broadcast(torch.where(t > 0, t, 1.0), x), slope)
        return Advance(x_next, carry, seen)

    return Method(_keys(key), step, order=base.order, evaluations=base.evaluations, name=f"{base.name}_churn")


METHODS = {"euler_ancestral": ancestral, "euler_renoised": renoised, "heun_churn": churn}
"""The stochastic methods by name: functions of a key, for command lines."""


def _keys(key: Key):
    """The `init` of a method that carries a key for each sample."""

    def init(x: Tensor, t: Tensor) -> Key:
        return prng.sample_keys(key.to(x.device), len(x))

    return init


def _draw(keys: Key, x: Tensor) -> tuple[Key, Tensor]:
    """The keys of the steps to come, and noise shaped like x."""
    both = prng.split(keys)
    return both[..., 0, :], prng.normal(both[..., 1, :], x.shape[1:], x.dtype)


def _root(square: Tensor) -> Tensor:
    """The square root, 0 for what rounding or gamma = 0 leaves at or below 0, with a finite derivative there."""
    positive = square > 0
    return torch.where(positive, torch.sqrt(torch.where(positive, square, 1.0)), 0.0)
