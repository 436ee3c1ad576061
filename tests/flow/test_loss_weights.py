"""Weights of the flow loss: closed forms, and what they are of the losses of data and of noise."""

import math

import pytest
import torch

from functional_sd3.core import prng
from functional_sd3.flow import loss_weights, path

T = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)


def errors(t, of):
    """Squared errors of a velocity that is off by `of`, and of the data and noise that it predicts."""
    x0, noise = prng.normal(prng.key(0), (3, 5), torch.float64), prng.normal(prng.key(1), (3, 5), torch.float64)
    x, velocity = path.interpolate(x0, noise, t), path.target(x0, noise) + of
    data, of_noise = path.denoised(x, velocity, t), path.noise_of(x, velocity, t)
    return [float((a - b).square().mean()) for a, b in ((velocity, noise - x0), (data, x0), (of_noise, noise))]


@pytest.mark.parametrize("t", [0.1, 0.5, 0.83])
def test_data_and_noise_weights_turn_the_velocitys_error_into_theirs(t):
    velocity, data, noise = errors(t, prng.normal(prng.key(2), (3, 5), torch.float64))
    time = torch.tensor(t, dtype=torch.float64)
    assert float(loss_weights.data(time)) * velocity == pytest.approx(data, rel=1e-9)
    assert float(loss_weights.noise(time)) * velocity == pytest.approx(noise, rel=1e-9)


@pytest.mark.parametrize("gamma", [0.3, 5.0, 20.0])
def test_min_snr_is_hangs_weight_of_data_and_of_noise(gamma):
    snr = (1 - T) ** 2 / T**2
    of_data, of_noise = snr.clamp_max(gamma), (gamma / snr).clamp_max(1)
    weights = loss_weights.min_snr(T, gamma)
    torch.testing.assert_close(weights, of_data * loss_weights.data(T))
    torch.testing.assert_close(weights, of_noise * loss_weights.noise(T))
    # As (min(SNR, gamma) / SNR) of noise: no division by an SNR of 0 at the ends.
    assert loss_weights.min_snr(torch.tensor([0.0, 1.0])).tolist() == [0.0, 0.0]


def test_cosmap_is_the_density_of_the_cosine_map():
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    weights = loss_weights.cosine_map(grid)
    assert float(torch.trapezoid(weights, grid)) == pytest.approx(1, abs=1e-8)
    # The cumulative weight is u(t), of which t = cosine_map(u) is the inverse.
    cumulative = torch.cumulative_trapezoid(weights, grid)[9_999]
    assert float(cumulative) == pytest.approx(2 / math.pi * math.atan(1.0), abs=1e-8)
    drawn = path.cosine_map(prng.key(3), (20_000,))
    shares = torch.histc(drawn, 10, 0, 1) / len(drawn)
    expected = torch.stack([weights[2000 * i : 2000 * (i + 1)].mean() for i in range(10)]) / 10
    torch.testing.assert_close(shares.double(), expected, atol=0.01, rtol=0)


def test_sigma_sqrt_has_no_pole_at_data():
    assert loss_weights.sigma_sqrt(torch.tensor([0.0, 0.5])).tolist() == pytest.approx([1e6, 4.0])


def test_a_weight_is_a_density_of_times():
    """Uniform times weighted by p(t) have the mean of times drawn from p."""
    value = lambda t: torch.sin(3 * t) + t  # noqa: E731
    uniform, drawn = path.uniform(prng.key(4), (40_000,)), path.cosine_map(prng.key(5), (40_000,))
    weighted = (loss_weights.cosine_map(uniform) * value(uniform)).mean()
    assert float(weighted) == pytest.approx(float(value(drawn).mean()), abs=0.02)


def test_weights_of_several_names_are_multiplied():
    both = loss_weights.product(loss_weights.data, loss_weights.cosine_map)
    torch.testing.assert_close(both(T), T**2 * loss_weights.cosine_map(T))


def test_a_gamma_that_is_no_positive_number_is_refused():
    for gamma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be a positive number"):
            loss_weights.min_snr(T, gamma)
