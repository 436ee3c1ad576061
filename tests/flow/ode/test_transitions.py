"""Gaussian transitions of stochastic samplers: against their formulas, Euler's step, and the flow of Gaussian data."""

import math

import pytest
import torch

from functional_sd3.core import prng
from functional_sd3.flow.ode import transitions

X, V = prng.normal(prng.key(0), (3, 2, 4)), prng.normal(prng.key(1), (3, 2, 4))


def times(t, s):
    return torch.tensor(t), torch.tensor(s)


@pytest.mark.parametrize("at", [(0.8, 0.6), (1.0, 0.9), (0.1, 0.0)])
def test_means_and_deviations_are_those_of_the_code(at):
    t, s = at
    mean, std = transitions.flow_sde(0.7)(X, V, *times(t, s))
    sigma = 0.7 * math.sqrt(t / (1 - (t if t < 1 else s)))
    length = s - t
    expected = X * (1 + sigma**2 / (2 * t) * length) + V * (1 + sigma**2 * (1 - t) / (2 * t)) * length
    torch.testing.assert_close(mean, expected)
    assert float(std) == pytest.approx(sigma * math.sqrt(-length), rel=1e-5)

    data, noise = X - t * V, X + (1 - t) * V
    mean, std = transitions.cps(0.8)(X, V, *times(t, s))
    sigma = s * math.sin(0.4 * math.pi)
    torch.testing.assert_close(mean, (1 - s) * data + math.sqrt(s**2 - sigma**2) * noise)
    assert float(std) == pytest.approx(sigma, rel=1e-5)

    mean, std = transitions.dance(0.3)(X, V, *times(t, s))
    score = -(X - (1 - t) * data) / t**2
    torch.testing.assert_close(mean, X + length * V - 0.3**2 / 2 * score * length)
    assert float(std) == pytest.approx(0.3 * math.sqrt(-length), rel=1e-5)


@pytest.mark.parametrize(
    "rule", [transitions.flow_sde(0.0), transitions.cps(0.0), transitions.dance(0.0), transitions.euler()]
)
def test_without_noise_they_are_eulers_step(rule):
    for t, s in [(1.0, 0.7), (0.7, 0.2), (0.2, 0.0)]:
        mean, std = rule(X, V, *times(t, s))
        torch.testing.assert_close(mean, X + (s - t) * V, rtol=1e-5, atol=1e-6)
        assert float(std) == 0.0


def test_times_of_each_sample_are_those_of_each_alone():
    t, s = torch.tensor([0.9, 0.5, 1.0]), torch.tensor([0.8, 0.1, 0.6])
    for rule in (transitions.flow_sde(), transitions.cps(), transitions.dance()):
        whole = rule(X, V, t, s)
        for i in range(3):
            alone = rule(X[i : i + 1], V[i : i + 1], t[i], s[i])
            torch.testing.assert_close(whole.mean[i], alone.mean[0])
            torch.testing.assert_close(whole.std[i], alone.std)


def drawn(rule, deviation, steps):
    """Mean and deviation, at t = 0 and in between, of x_0 ~ N(1.5, deviation^2), whose velocity is linear in x."""

    def velocity(x, t):
        variance = (1 - t) ** 2 * deviation**2 + t**2
        return (t - (1 - t) * deviation**2) / variance * (x - (1 - t) * 1.5) - 1.5

    grid, moments = torch.linspace(1, 0, steps + 1), {}
    x = prng.normal(prng.key(2), (40_000,))
    for index, (t, s) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        x = transitions.draw(rule(x, velocity(x, t), t, s), prng.normal(prng.fold_in(prng.key(3), index), x.shape))
        moments[round(float(s), 3)] = float(x.mean()), float(x.std())
    return moments


@pytest.mark.parametrize("rule", [transitions.flow_sde(0.7), transitions.dance(0.3)])
def test_stochastic_equations_keep_the_distributions_of_the_path(rule):
    moments = drawn(rule, 0.5, 200)
    for t in (0.5, 0.0):
        expected = 1.5 * (1 - t), math.sqrt((1 - t) ** 2 * 0.25 + t**2)
        assert moments[t] == pytest.approx(expected, abs=0.02)


def test_cps_keeps_the_level_of_noise_in_every_step():
    # Exactly so where the predicted data is the data: of a single point.
    for t, moments in drawn(transitions.cps(0.8), 0.0, 5).items():
        assert moments == pytest.approx((1.5 * (1 - t), t), abs=0.02)
    # Flow-GRPO's noise is too much for few steps: what CPS was made against.
    assert drawn(transitions.flow_sde(0.8), 0.0, 5)[0.2][1] > 0.22


def test_the_log_density_is_that_of_a_normal_by_its_mean():
    step = transitions.Transition(X, torch.tensor([0.5, 1.0, 2.0]))
    x = X + V
    densities = torch.distributions.Normal(X, step.std[:, None, None]).log_prob(x)
    torch.testing.assert_close(transitions.mean_log_density(x, step), densities.flatten(1).mean(1))
