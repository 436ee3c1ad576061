"""The straight path, its densities of time, and the loss."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from functional_sd3.core import prng
from functional_sd3.flow import path, schedule

# torch builds its own forward-mode rules with torch.jit.script on the first jvp.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
DRAWS = (20_000,)


def sample(seed=0, shape=(4, 3, 5, 2), dtype=torch.float64):
    data, noise, t = prng.split(prng.key(seed), 3)
    return prng.normal(data, shape, dtype), prng.normal(noise, shape, dtype), prng.uniform(t, shape[:1], dtype)


def test_the_path_starts_at_data_and_ends_at_noise():
    x0, noise, _ = sample()
    assert torch.equal(path.interpolate(x0, noise, torch.zeros(4)), x0)
    assert torch.equal(path.interpolate(x0, noise, torch.ones(4)), noise)


def test_each_sample_is_interpolated_at_its_own_time():
    x0, noise, t = sample()
    batched = path.interpolate(x0, noise, t)
    for i in range(4):
        assert torch.equal(batched[i], path.interpolate(x0[i : i + 1], noise[i : i + 1], float(t[i]))[0])


def test_the_target_is_the_time_derivative_of_the_path():
    x0, noise, t = sample()
    _, derivative = torch.func.jvp(lambda t: path.interpolate(x0, noise, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(derivative, path.target(x0, noise))


def test_both_ends_and_the_velocity_are_recovered_from_the_middle():
    x0, noise, t = sample()
    x, v = path.interpolate(x0, noise, t), path.target(x0, noise)
    torch.testing.assert_close(path.denoised(x, v, t), x0)
    torch.testing.assert_close(path.noise_of(x, v, t), noise)
    torch.testing.assert_close(path.velocity_of(x, x0, t), v)


def test_the_loss_of_the_true_velocity_is_zero_and_of_zero_is_the_mean_square_of_the_target():
    x0, noise, t = sample(dtype=torch.float32)
    assert path.loss(lambda x, t: noise - x0, x0, noise, t).abs().max() == 0
    expected = (noise - x0).square().mean((1, 2, 3))
    torch.testing.assert_close(path.loss(lambda x, t: torch.zeros_like(x), x0, noise, t), expected)


def test_the_loss_is_one_float32_number_a_sample_whatever_the_dtype_of_the_network():
    x0, noise, t = sample(dtype=torch.bfloat16)
    losses = path.loss(lambda x, t: x.bfloat16(), x0, noise, t)
    assert losses.shape == (4,) and losses.dtype == torch.float32


def test_the_velocity_is_called_with_the_noised_sample_and_its_time():
    x0, noise, t = sample(dtype=torch.float32)
    recorded = []
    path.loss(lambda x, t: recorded.append((x, t)) or x, x0, noise, t)
    ((x, time),) = recorded
    assert torch.equal(x, path.interpolate(x0, noise, t)) and torch.equal(time, t)


def test_weights_multiply_the_loss_of_each_sample():
    x0, noise, t = sample(dtype=torch.float32)
    plain = path.loss(lambda x, t: x, x0, noise, t)
    torch.testing.assert_close(path.loss(lambda x, t: x, x0, noise, t, weight=t), t * plain)


def test_the_loss_of_a_sample_does_not_depend_on_its_batch_and_vmaps_and_differentiates():
    x0, noise, t = sample()
    whole = path.loss(lambda x, t: 0.3 * x, x0, noise, t)
    singles = zip(x0.split(1), noise.split(1), t.split(1), strict=True)
    alone = torch.cat([path.loss(lambda x, t: 0.3 * x, *single) for single in singles])
    torch.testing.assert_close(alone, whole)

    def one(scale, x0, noise, t):
        return path.loss(lambda x, t: scale * x, x0[None], noise[None], t[None])[0]

    scale = torch.tensor(0.3, dtype=torch.float64)
    each = torch.func.vmap(torch.func.grad(one), (None, 0, 0, 0))(scale, x0, noise, t)
    whole_gradient = torch.func.grad(lambda s: path.loss(lambda x, t: s * x, x0, noise, t).sum())(scale)
    torch.testing.assert_close(each.sum(), whole_gradient)


def test_mismatched_shapes_are_named():
    x0, noise, t = sample()
    with pytest.raises(ValueError, match=r"x0 \(4, 3, 5, 2\) and noise \(4, 3, 5\)"):
        path.loss(lambda x, t: x, x0, noise[..., 0], t)
    with pytest.raises(ValueError, match=r"velocity has shape \(4, 3, 5\)"):
        path.loss(lambda x, t: x[..., 0], x0, noise, t)


@pytest.mark.parametrize(
    ("draw", "cdf"),
    [
        (path.uniform, stats.uniform.cdf),
        (path.logit_normal, lambda t: stats.norm.cdf(np.log(t / (1 - t)))),
        (
            lambda key, shape: path.logit_normal(key, shape, mean=0.5, std=0.6),
            lambda t: stats.norm.cdf((np.log(t / (1 - t)) - 0.5) / 0.6),
        ),
        (
            lambda key, shape: schedule.shift(path.logit_normal(key, shape), 3.0),
            lambda t: stats.norm.cdf(np.log(t / (1 - t)) - math.log(3.0)),
        ),
        # t is decreasing in u, so P(T <= t) is 1 - u(t), with u(t) actual by inverting the formula on a fine grid.
        (path.mode, lambda t: 1 - invert_mode(t, 1.29)),
        (lambda key, shape: path.mode(key, shape, scale=-0.8), lambda t: 1 - invert_mode(t, -0.8)),
        (path.cosine_map, lambda t: 2 / np.pi * np.arctan(t / (1 - t))),
    ],
    ids=["uniform", "logit_normal", "logit_normal(0.5, 0.6)", "shifted", "mode", "mode(-0.8)", "cosine_map"],
)
def test_times_follow_their_density(draw, cdf):
    t = draw(prng.key(7), DRAWS)
    assert t.shape == DRAWS and t.dtype == torch.float32
    assert ((t >= 0) & (t <= 1)).all()
    assert stats.kstest(t.double().numpy(), cdf).pvalue > 0.01


def invert_mode(t, scale):
    u = np.linspace(0, 1, 200_001)
    values = 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    return np.interp(t, values[::-1], u[::-1])


@pytest.mark.parametrize(
    "log_density",
    [
        path.logit_normal_log_density,
        lambda t: path.logit_normal_log_density(t, mean=-0.7, std=0.5),
        lambda t: path.logit_normal_log_density(t, mean=torch.tensor(0.3), std=torch.tensor(1.4)),
    ],
)
def test_densities_integrate_to_one(log_density):
    t = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    assert torch.trapezoid(log_density(t).exp(), t).item() == pytest.approx(1, abs=1e-5)


def test_the_logit_normal_density_is_scipys():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    logit = torch.logit(t)
    expected = stats.norm.logpdf(logit.numpy(), 0.2, 0.9) - torch.log(t * (1 - t)).numpy()
    np.testing.assert_allclose(path.logit_normal_log_density(t, 0.2, 0.9).numpy(), expected, rtol=1e-12)


def test_a_larger_mean_is_more_noise():
    assert path.logit_normal(prng.key(0), DRAWS, mean=1.0).mean() > path.logit_normal(prng.key(0), DRAWS).mean() + 0.1


def test_a_mode_scale_that_folds_the_line_is_refused():
    with pytest.raises(ValueError, match="mode scale 1.8"):
        path.mode(prng.key(0), (3,), scale=1.8)
