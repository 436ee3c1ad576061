"""Gaussian transitions of stochastic samplers: mean and standard deviation of x_s given x_t and the velocity there.

With s < t, D = s - t, and the ends of the line along v, the predicted data x_0' = x - t v and noise e' = x + (1 - t) v:

    flow_sde   mean = x + v D + sigma^2 D e' / 2t,  std = sigma sqrt(-D),
               sigma = a sqrt(t / (1 - t)), at t = 1 with s in place of the second t
    dance      the same with sigma = eta
    cps        mean = (1 - s) x_0' + sqrt(s^2 - std^2) e',  std = s sin(a pi / 2)
    ancestral  mean = k (x + (d - t) v),  std = scale sqrt(s^2 - (k d)^2),  k = (1 - s) / (1 - d),
               d = s (1 + eta (s / t - 1))
    renoised   mean = (1 - s) x_0',  std = s

flow_sde and dance are Euler-Maruyama steps of dx = (v + sigma^2 e' / 2t) dt + sigma dw, whose distributions are the
flow's for any sigma, the score being -e' / t: Liu et al. 2025, arXiv:2505.05470 (Flow-GRPO, as its code has it), Xue et
al. 2025, arXiv:2505.07818 (DanceGRPO). cps: Wang and Yu 2025, arXiv:2509.05952 (coefficients-preserving sampling).
a = 0 and eta = 0 are Euler's step. `stochastic` has the methods of these rules.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from functional_sd3.flow.ode.method import Transition
from functional_sd3.flow.path import broadcast, denoised, noise_of

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Transition]
"""`(x (batch, ...), velocity at x, t, s) -> Transition`; t and s () or (batch,), s < t."""


def flow_sde(a: float | Tensor = 0.7) -> Rule:
    """Flow-GRPO's stochastic step, of noise level `a` >= 0."""
    _check("a", a, math.inf)

    def rule(x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        return _euler_maruyama(x, v, t, s, a * torch.sqrt(t / (1 - torch.where(t < 1, t, s))))

    return rule


def cps(a: float | Tensor = 0.8) -> Rule:
    """Coefficients-preserving sampling: the noise level of every step is the path's. a in [0, 1]; 1 is `renoised`."""
    _check("a", a, 1.0)

    def rule(x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        half = torch.as_tensor(a, dtype=t.dtype, device=t.device) * (math.pi / 4)
        # Euler's step, and cos(2 half) - 1 times s e' without cancellation, so that a = 0 is Euler's to the bit.
        less = -2 * s * torch.sin(half).square()
        return Transition(_euler(x, v, t, s) + broadcast(less, x) * noise_of(x, v, t), s * torch.sin(2 * half))

    return rule


def dance(eta: float | Tensor = 0.3) -> Rule:
    """DanceGRPO's stochastic step, of constant noise `eta` >= 0."""
    _check("eta", eta, math.inf)

    def rule(x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        return _euler_maruyama(x, v, t, s, torch.as_tensor(eta, dtype=t.dtype, device=t.device))

    return rule


def ancestral(eta: float | Tensor = 1.0, scale: float | Tensor = 1.0) -> Rule:
    """Ancestral Euler's step: by Euler to d, below s, and noise up to s. eta in [0, 1]; scale: of the noise."""

    def rule(x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        d = s * (1 + eta * (s / t - 1))
        k = (1 - s) / (1 - d)
        return Transition(broadcast(k, x) * (x + broadcast(d - t, x) * v), scale * safe_sqrt(s**2 - (k * d) ** 2))

    return rule


def renoised() -> Rule:
    """The predicted data, with new noise of the level s."""

    def rule(x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        return Transition(broadcast(1 - s, x) * denoised(x, v, t), s)

    return rule


def euler() -> Rule:
    """Euler's step, without noise."""

    def rule(x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        return Transition(_euler(x, v, t, s), torch.zeros_like(s - t))

    return rule


def draw(transition: Transition, noise: Tensor) -> Tensor:
    """mean + std noise."""
    return transition.mean + broadcast(transition.std, noise) * noise


def mean_log_density(x: Tensor, transition: Transition) -> Tensor:
    """Log-density of `x` under the transition, the mean over a sample's numbers instead of their sum: (batch,).

    A mean keeps ratios of likelihoods near 1 at any size of images. Not finite where the standard deviation is 0.
    """
    mean, std = transition
    squares = (x - mean).square().flatten(1).mean(1)
    return -squares / (2 * std.square()) - torch.log(std) - 0.5 * math.log(2 * math.pi)


def log_density(x: Tensor, transition: Transition) -> Tensor:
    """Log-density of `x` under the transition, the sum over a sample's numbers, (batch,).

    0 where the standard deviation is 0: a step without noise has no density, so it adds nothing to a sum or gradient.
    """
    mean, std = transition
    has_density = std > 0
    # The deviation has another, finite value elsewhere, so that its derivative is finite too.
    std = torch.where(has_density, std, 1.0)
    squares = ((x - mean) / broadcast(std, x)).square().reshape(len(x), -1).sum(1)
    constant = x[0].numel() * (torch.log(std) + 0.5 * math.log(2 * math.pi))
    return torch.where(has_density, -0.5 * squares - constant, 0.0)


def safe_sqrt(square: Tensor) -> Tensor:
    """The square root, 0 at and below 0 (by rounding), with a finite derivative there."""
    positive = square > 0
    return torch.where(positive, torch.sqrt(torch.where(positive, square, 1.0)), 0.0)


def _euler(x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return x + broadcast(s - t, x) * v


def _euler_maruyama(x: Tensor, v: Tensor, t: Tensor, s: Tensor, sigma: Tensor) -> Transition:
    drift = sigma.square() * (s - t) / (2 * t)
    return Transition(_euler(x, v, t, s) + broadcast(drift, x) * noise_of(x, v, t), sigma * torch.sqrt(t - s))


def _check(name: str, amount: float | Tensor, highest: float) -> None:
    """Raises ValueError for a number outside [0, highest], or not finite."""
    if not isinstance(amount, Tensor) and not (0 <= amount <= highest and math.isfinite(amount)):
        bound = "at least 0" if highest == math.inf else f"between 0 and {highest:g}"
        raise ValueError(f"{name} {amount} must be a number {bound}; 0 draws no noise")
