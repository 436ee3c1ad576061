"""Gaussian transitions of stochastic samplers: mean and standard deviation of x_s given x_t and the velocity there.

The three whose likelihoods policies are trained by, s < t, D = s - t, predicted data x_0' = x - t v and noise
e' = x + (1 - t) v:

    flow_sde  mean = x (1 + sigma^2 D / 2t) + v (1 + sigma^2 (1 - t) / 2t) D,  std = sigma sqrt(-D),
              sigma = a sqrt(t / (1 - t)), at t = 1 with s in place of the second t
    cps       mean = (1 - s) x_0' + sqrt(s^2 - std^2) e',  std = s sin(a pi / 2)
    dance     mean = x + v D - eta^2 D score / 2,  std = eta sqrt(-D),  score = -(x - (1 - t) x_0') / t^2

Liu et al. 2025, arXiv:2505.05470 (Flow-GRPO, as its code has it); Wang and Yu 2025, arXiv:2509.05952 (coefficients-
preserving sampling); Xue et al. 2025, arXiv:2505.07818 (DanceGRPO). a = 0 and eta = 0 are Euler's step.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.flow.path import broadcast, denoised, noise_of


class Transition(NamedTuple):
    """x_s = mean + std noise: mean (batch, ...); std () or (batch,), 0 where nothing is drawn."""

    mean: Tensor
    std: Tensor


Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Transition]
"""`(x (batch, ...), velocity at x, t, s) -> Transition`; t and s () or (batch,), s < t."""


def flow_sde(a: float | Tensor = 0.7) -> Rule:
    """Flow-GRPO's stochastic step, of noise level `a`."""

    def rule(x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        length = s - t
        sigma = a * torch.sqrt(t / (1 - torch.where(t < 1, t, s)))
        drift = sigma.square() * length / (2 * t)
        slope = (1 + sigma.square() * (1 - t) / (2 * t)) * length
        return Transition((1 + broadcast(drift, x)) * x + broadcast(slope, x) * v, sigma * torch.sqrt(-length))

    return rule


def cps(a: float = 0.8) -> Rule:
    """Coefficients-preserving sampling: the noise level of every step is the path's. a in [0, 1]."""

    def rule(x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        angle = a * math.pi / 2
        mean = broadcast(1 - s, x) * denoised(x, v, t) + broadcast(s * math.cos(angle), x) * noise_of(x, v, t)
        return Transition(mean, s * math.sin(angle))

    return rule


def dance(eta: float | Tensor = 0.3) -> Rule:
    """DanceGRPO's stochastic step, of constant noise `eta`."""

    def rule(x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        length = s - t
        score = -(x - broadcast(1 - t, x) * denoised(x, v, t)) / broadcast(t.square(), x)
        mean = x + broadcast(length, x) * v - broadcast(eta**2 * length / 2, x) * score
        return Transition(mean, eta * torch.sqrt(-length))

    return rule


def euler() -> Rule:
    """Euler's step, which draws nothing."""

    def rule(x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        return Transition(x + broadcast(s - t, x) * v, torch.zeros_like(s - t))

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
