"""Samplers of the flow's SDE and the log-probabilities of their steps, against closed forms on Gaussian flows."""

import math

import pytest
import torch

from functional_sd3.core import prng
from functional_sd3.flow import guidance, ode, schedule
from tests.flow.ode.flows import MEAN, STD, field, gaussian_field, noise

KEY = prng.key(21)
METHODS = {
    "euler_ancestral": ode.ancestral(KEY, 0.6, 0.9),
    "euler_renoised": ode.renoised(KEY),
    "flow_sde": ode.flow_sde(KEY, 0.7),
    "cps": ode.cps(KEY, 0.8),
    "dance": ode.dance(KEY, 0.4),
}
ALL = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def spread(t):
    """Standard deviation of the Gaussian flow at t."""
    return math.sqrt((1 - t) ** 2 * STD**2 + t**2)


def moments(method, times):
    """Exact mean and standard deviation at the end of a run on the Gaussian flow, whose velocity is affine in x."""
    mean, variance = (1 - times[0]) * MEAN, spread(times[0]) ** 2
    for t, s in zip(times, times[1:], strict=False):
        points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        (at_zero, at_one), std = ode.transition(method, gaussian_field, points, t, s)
        slope = float(at_one - at_zero)
        mean, variance = float(at_zero) + slope * mean, slope**2 * variance + float(std) ** 2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("make", [ode.flow_sde, ode.cps, ode.dance])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_noise_they_are_eulers_method_to_the_bit(make, dtype):
    x, grid = noise((3, 4), dtype), schedule.sigmas(8)
    euler = ode.integrate(ode.EULER, field, x, grid, save="all")
    assert torch.equal(ode.integrate(make(KEY, 0.0), field, x, grid, save="all"), euler)
    assert torch.equal(ode.integrate(make(KEY, torch.tensor(0.0)), field, x, grid, save="all"), euler)
    assert not torch.allclose(ode.integrate(make(KEY), field, x, grid), euler[-1], atol=1e-2)


def test_cps_of_one_is_renoised():
    x, grid = noise((3, 4)), schedule.sigmas(5)
    expected = ode.integrate(ode.renoised(KEY), field, x, grid)
    torch.testing.assert_close(ode.integrate(ode.cps(KEY, 1.0), field, x, grid), expected)


def error(method, start, end, steps):
    """Of the standard deviation at the end of a run of even steps."""
    return abs(moments(method, [start - (start - end) * i / steps for i in range(steps + 1)])[1] - spread(end))


@pytest.mark.parametrize("method", [ode.ancestral(KEY), METHODS["flow_sde"], METHODS["dance"]], ids=lambda m: m.name)
@pytest.mark.parametrize("end", [0.3, 0.0])
def test_more_steps_bring_the_distributions_of_the_flow_with_order_one(method, end):
    coarse, fine = (error(method, 0.9, end, steps) for steps in (50, 200))
    assert coarse > 1e-3 and fine < coarse / 3
    assert moments(method, torch.linspace(0.9, end, 100).tolist())[0] == pytest.approx((1 - end) * MEAN, abs=1e-6)


def test_flow_sde_from_pure_noise_is_of_order_one_half():
    coarse, fine = (error(METHODS["flow_sde"], 1.0, 0.3, steps) for steps in (200, 800))
    assert fine / coarse == pytest.approx(0.5, abs=0.1)


@ALL
def test_samples_have_the_moments_of_the_transitions(method):
    times = [0.9, 0.7, 0.4, 0.1]
    x = (1 - times[0]) * MEAN + spread(times[0]) * noise((20_000, 1))
    x = ode.integrate(method, gaussian_field, x, times)
    mean, std = moments(method, times)
    assert x.mean().item() == pytest.approx(mean, abs=4 * std / 20_000**0.5)
    assert x.std().item() == pytest.approx(std, rel=4 / 40_000**0.5)


@ALL
def test_the_log_probability_of_a_step_is_that_of_its_normal_distribution(method):
    x, x_s = noise((4, 3)), noise((4, 3), seed=1)
    t, s = torch.tensor([1.0, 0.8, 0.5, 0.3]).double(), torch.tensor([0.9, 0.4, 0.45, 0.1]).double()
    mean, std = ode.transition(method, field, x, t, s)
    expected = torch.distributions.Normal(mean, std[:, None]).log_prob(x_s).sum(1)
    torch.testing.assert_close(ode.log_prob(method, field, x, t, s, x_s), expected)
    alone = ode.log_prob(method, field, x[1:2], 0.8, 0.4, x_s[1:2])
    torch.testing.assert_close(alone, expected[1:2], rtol=1e-6, atol=1e-6)


@ALL
def test_the_log_probability_of_a_trajectory_has_the_mean_of_its_entropy(method):
    # E log p = -sum of (1 + log(2 pi std^2)) / 2 over steps and elements; its variance is 1 / 2 for each.
    times, count = torch.tensor([0.9, 0.6, 0.4, 0.2]).double(), 20_000
    states = ode.integrate(method, gaussian_field, noise((count, 2)), times, save="all")
    log_probs = ode.log_probs(method, gaussian_field, states, times)
    assert log_probs.shape == (3, count)
    stds = [
        ode.transition(method, gaussian_field, states[0][:1], t, s).std for t, s in zip(times, times[1:], strict=False)
    ]
    entropy = sum(1 + math.log(2 * math.pi * float(std) ** 2) for std in stds)
    assert log_probs.sum(0).mean().item() == pytest.approx(-entropy, abs=4 * (3 / count) ** 0.5)


@ALL
def test_a_run_that_records_them_has_the_same_samples_and_the_log_probabilities_of_its_states(method):
    x, grid = noise((3, 4), torch.float32), schedule.sigmas(6)
    scales = ode.Stepwise(lambda step: lambda x, t: (1 + 0.1 * step) * field(x, t))
    runner = ode.with_log_prob(method)
    kept = ode.integrate(runner, scales, x, grid, save=lambda info: (info.x, info.state.carry["log_prob"]))
    states = ode.integrate(method, scales, x, grid, save="all")
    assert torch.equal(torch.stack([x for x, _ in kept]), states[1:])
    log_probs = ode.log_probs(method, scales, states, grid)
    # On the policy that drew them ratios are 1.
    assert torch.equal(torch.stack([value for _, value in kept]), log_probs)
    assert log_probs.abs().min(1).values.gt(0).tolist() == [True] * 5 + [method.name in ("flow_sde", "dance")]
    other = ode.log_probs(method, lambda x, t: 1.35 * field(x, t), states, grid)
    assert (other - log_probs)[:5].abs().min() > 0
    # A guidance that carries a state may be around it.
    guided = guidance.with_carry(runner, guidance.cfg(2.0))
    carried = ode.integrate(
        guided, lambda x, t, carry: (scales.at(0)(x, t), carry), x, grid, save=lambda info: info.state
    )
    expected = ode.integrate(method, scales.at(0), x, grid, save="all")
    assert torch.equal(carried[-1].x, expected[-1])
    recorded = torch.stack([state.carry["method"]["log_prob"] for state in carried])
    assert torch.equal(recorded, ode.log_probs(method, scales.at(0), expected, grid))


@ALL
def test_log_probabilities_have_finite_derivatives_down_to_zero_vmap_and_compile(method):
    states, grid = noise((4, 2, 3)), schedule.sigmas(3).double()

    def total(weight, states):
        return ode.log_probs(method, lambda x, t: weight * field(x, t), states, grid).sum()

    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total, (weight, states.clone().requires_grad_()))
    gradient = torch.func.grad(total)
    weights = torch.tensor([0.7, 0.9]).double()
    expected = torch.stack([gradient(weight, states) for weight in weights])
    assert torch.isfinite(expected).all() and expected.abs().min() > 1e-3
    torch.testing.assert_close(torch.func.vmap(gradient, (0, None))(weights, states), expected)
    if method.name == "flow_sde":
        compiled = torch.compile(gradient, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(weights[0], states), expected[0])


@pytest.mark.parametrize("make", [ode.flow_sde, ode.cps, ode.dance])
def test_the_amount_of_noise_has_derivatives(make):
    def result(amount):
        return ode.integrate(make(KEY, amount), field, noise((2, 2)), [1.0, 0.6, 0.2, 0.0])

    assert torch.autograd.gradcheck(result, torch.tensor(0.5, dtype=torch.float64, requires_grad=True))
    assert torch.isfinite(torch.func.grad(lambda a: result(a).sum())(torch.tensor(0.0, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ode.transition(ode.EULER, field, x, 0.5, 0.4), "euler has no transition density: it draws no noise"),
        (lambda x: ode.log_prob(ode.DOPRI5, field, x, 0.5, 0.4, x), "dopri5 has no transition density"),
        (
            lambda x: ode.with_log_prob(ode.churn(KEY)),
            "heun_churn has no.*evaluates the velocity after",
        ),
        (lambda x: ode.log_probs(ode.HEUN_EDM, field, x[None].expand(3, -1, -1), [1.0, 0.5, 0.0]), "heun_edm has no"),
        (
            lambda x: ode.with_log_prob(guidance.with_carry(ode.cps(KEY), guidance.apg(2.0))),
            "cps has no transition density",
        ),
        (lambda x: ode.log_probs(ode.cps(KEY), field, x[None].expand(3, -1, -1), [1.0, 0.0]), "3 states at 2 times"),
        (lambda x: ode.flow_sde(KEY, -0.1), "a -0.1 must be a number at least 0; 0 draws no noise"),
        (lambda x: ode.dance(KEY, math.inf), "eta inf must be a number at least 0"),
        (lambda x: ode.cps(KEY, 1.5), "a 1.5 must be a number between 0 and 1"),
    ],
)
def test_methods_without_a_density_and_wrong_numbers_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(noise((2, 3)))
