"""Stochastic methods: their distributions against closed forms, their keys, and what they share with plain ones."""

import math

import pytest
import torch
from safetensors.torch import load, save

from functional_sd3.core import prng
from functional_sd3.flow import ode, schedule
from functional_sd3.flow.ode import stochastic
from functional_sd3.flow.path import broadcast
from tests.flow.ode.flows import MEAN, STD, field, gaussian_field, noise

KEY = prng.key(11)
MAKERS = pytest.mark.parametrize("make", ode.STOCHASTIC.values(), ids=ode.STOCHASTIC)


def spread(t):
    """Standard deviation of the Gaussian flow at t."""
    return math.sqrt((1 - t) ** 2 * STD**2 + t**2)


def moments(method, steps, start=1.0, end=0.0, samples=10_000):
    """Mean and standard deviation at `end` of many samples of the Gaussian flow that start at `start`."""
    x = (1 - start) * MEAN + spread(start) * noise((samples, 1), torch.float32)
    x = ode.integrate(method, gaussian_field, x, torch.linspace(start, end, steps + 1))
    return x.mean().item(), x.std().item()


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_steps_approach_the_distributions_of_the_flow_with_order_one(eta):
    errors = [abs(moments(ode.ancestral(KEY, eta), steps, 0.95, 0.1)[1] - spread(0.1)) for steps in (20, 80)]
    # A quarter of the step, a quarter of the error, to the accuracy of 10,000 samples (0.7 % of the spread).
    assert errors[0] > 0.02 and errors[1] < errors[0] / 3 + 0.002
    assert moments(ode.ancestral(KEY, eta), 200)[0] == pytest.approx(MEAN, abs=0.01)


def test_one_ancestral_step_is_its_formula():
    x, t, t_next = noise((2, 3)), 0.8, 0.5
    step_keys = prng.split(prng.fold_in(KEY, torch.arange(2)))[..., 1, :]
    for eta in (1.0, 0.4):
        down = t_next * (1 + eta * (t_next / t - 1))
        euler = x + (down - t) * field(x, torch.tensor(t, dtype=torch.float64))
        ratio = (1 - t_next) / (1 - down)
        expected = ratio * euler + math.sqrt(t_next**2 - (down * ratio) ** 2) * prng.normal(step_keys, 3, x.dtype)
        torch.testing.assert_close(ode.integrate(ode.ancestral(KEY, eta), field, x, [t, t_next]), expected)


def test_ancestral_noise_takes_the_lower_level_to_the_next_exactly():
    # Along straight lines from noise to one point Euler is exact, and so is every level's distribution.
    def velocity(x, t):
        return (x - MEAN) / broadcast(t, x)

    grid = torch.tensor([1.0, 0.8, 0.35], dtype=torch.float64)
    x = ode.integrate(ode.ancestral(KEY), velocity, noise((100_000, 1)), grid)
    assert x.mean().item() == pytest.approx(0.65 * MEAN, abs=0.005)
    assert x.std().item() == pytest.approx(0.35, rel=0.01)


def test_an_eta_of_zero_is_euler():
    x, grid = noise(), schedule.sigmas(7)
    euler = ode.integrate(ode.EULER, field, x, grid)
    torch.testing.assert_close(ode.integrate(ode.ancestral(KEY, 0.0), field, x, grid), euler)


def test_a_gamma_of_zero_is_the_base():
    x, grid = noise(), schedule.sigmas(7)
    for base in (ode.HEUN, ode.RK4):
        plain = ode.integrate(base, field, x, grid)
        assert torch.equal(ode.integrate(ode.churn(KEY, 0.0, base=base), field, x, grid), plain)
        outside = ode.churn(KEY, 0.3, lowest=0.2, highest=0.1, base=base)
        assert torch.equal(ode.integrate(outside, field, x, grid), plain)


@pytest.mark.parametrize("gamma", [0.05, 0.4])
@pytest.mark.parametrize("t", [1.0, 0.5, 0.1])
def test_churn_raises_a_level_of_the_flow_to_another_level_of_the_flow(gamma, t):
    # One step, whose velocity records where it is evaluated; velocity 0 leaves x there.
    evaluated = []

    def velocity(x, t):
        evaluated.append((x, t))
        return torch.zeros_like(x)

    x = (1 - t) * MEAN + spread(t) * noise((100_000, 1))
    ode.integrate(ode.churn(KEY, gamma, base=ode.EULER), velocity, x, [t, 0.0])
    ((raised_x, raised),) = evaluated
    sigma = raised / (1 - raised)
    assert raised == t == 1 or sigma.item() == pytest.approx((1 + gamma) * t / (1 - t))
    assert raised_x.mean().item() == pytest.approx((1 - raised.item()) * MEAN, abs=0.015)
    assert raised_x.std().item() == pytest.approx(spread(raised.item()), rel=0.01)


def test_churn_keeps_the_distribution_of_the_flow():
    mean, std = moments(ode.churn(KEY, 0.1), 40)
    assert mean == pytest.approx(MEAN, abs=0.01) and std == pytest.approx(STD, rel=0.02)


def test_renoised_draws_each_level_anew_around_the_prediction():
    def velocity(x, t):
        return (x - MEAN) / broadcast(t, x)

    x = noise((50_000, 1))
    half = ode.integrate(ode.renoised(KEY), velocity, x, [1.0, 0.6])
    assert half.mean().item() == pytest.approx(0.4 * MEAN, abs=0.01) and half.std().item() == pytest.approx(
        0.6, rel=0.02
    )
    # Nothing is left of the noise it came from.
    assert abs(torch.corrcoef(torch.stack([half[:, 0], x[:, 0]]))[0, 1].item()) < 0.02
    torch.testing.assert_close(ode.integrate(ode.renoised(KEY), velocity, x, [1.0, 0.6, 0.0]), torch.full_like(x, MEAN))


def test_the_mean_that_renoised_goes_back_to_is_too_smooth_for_the_flow():
    # What its docstring warns of: E[x_0 | x_t] spreads less than x_0, and steps do not make up for it.
    assert moments(ode.renoised(KEY), 50)[1] < 0.75 * STD


@MAKERS
def test_steps_that_ascend_or_have_no_length_draw_nothing(make):
    x = noise()
    base = ode.HEUN if make is ode.churn else ode.EULER
    up = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    torch.testing.assert_close(ode.integrate(make(KEY), field, x, up), ode.integrate(base, field, x, up))
    assert torch.equal(ode.integrate(make(KEY), field, x, [0.4, 0.4]), x)


@MAKERS
def test_a_run_stopped_written_and_taken_up_again_is_the_whole_run_to_the_bit(make):
    x, grid, method = noise((2, 3, 4), torch.float32), schedule.sigmas(6), make(KEY)
    whole = ode.integrate(method, field, x, grid)
    for stop in range(1, 6):
        state = ode.run(method, field, ode.start(method, x, grid[0]), grid[: stop + 1], ends=False)
        written = save({name: tensor.contiguous() for name, tensor in ode.to_tensors(state).items()})
        # The key the method was made with no longer matters.
        resumed = ode.run(make(prng.key(99)), field, ode.from_tensors(load(written)), grid[stop:])
        assert torch.equal(resumed.x, whole), f"stopped after step {stop}"


@MAKERS
def test_the_noise_of_a_sample_depends_on_its_own_key_alone(make):
    x, grid = noise((4, 3), torch.float32), schedule.sigmas(5)
    keys = prng.split(KEY, 4)
    batched = ode.integrate(make(keys), field, x, grid)
    for i in range(4):
        assert torch.equal(ode.integrate(make(keys[i : i + 1]), field, x[i : i + 1], grid), batched[i : i + 1])
    first = ode.integrate(make(KEY), field, x, grid)
    assert torch.equal(ode.integrate(make(KEY), field, x[:2], grid), first[:2])
    assert not torch.equal(ode.integrate(make(prng.key(1)), field, x, grid), first)
    same = ode.integrate(make(KEY), field, x[:1].expand(2, -1), grid)
    assert not torch.equal(same[0], same[1])


@MAKERS
def test_every_step_draws_noise_of_its_own(make):
    states = []

    def velocity(x, t):
        states.append(x)
        return torch.zeros_like(x)

    method = ode.churn(KEY, base=ode.EULER) if make is ode.churn else make(KEY)
    ode.integrate(method, velocity, torch.zeros(1, 5000), [0.9, 0.8, 0.7, 0.6, 0.5])
    assert len(states) == 4
    rises = torch.cat([(after - before) for before, after in zip(states, states[1:], strict=False)])
    assert rises.abs().min(1).values.max() > 0 and torch.corrcoef(rises).triu(1).abs().max() < 0.75
    assert len({tuple(row[:4].tolist()) for row in rises}) == 3


@MAKERS
def test_interleaved_runs_equal_separate_ones_and_no_global_state_is_touched(make):
    grid, methods = schedule.sigmas(5), [make(KEY), make(prng.key(5))]
    before, x = torch.random.get_rng_state(), noise((2, 3))
    alone = [ode.integrate(method, field, x, grid) for method in methods]
    states = [ode.start(method, x, grid[0]) for method in methods]
    for t in grid[1:]:
        states = [ode.step(method, field, state, t) for method, state in zip(methods, states, strict=True)]
    assert all(torch.equal(state.x, result) for state, result in zip(states, alone, strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)


@MAKERS
def test_grids_of_different_lengths_run_as_one_batch(make):
    x, keys = noise((2, 3)), prng.split(KEY)
    grids = [schedule.sigmas(6).double(), schedule.sigmas(4).double()]
    batched = ode.integrate(make(keys), field, x, schedule.stack(grids))
    for i, grid in enumerate(grids):
        alone = ode.integrate(make(keys[i : i + 1]), field, x[i : i + 1], grid)
        torch.testing.assert_close(batched[i : i + 1], alone)


@MAKERS
def test_gradients_agree_with_differences_and_are_finite_at_the_ends(make):
    grid = torch.tensor([0.95, 0.7, 0.45, 0.2], dtype=torch.float64)

    def result(x, times, weight):
        return ode.integrate(make(KEY), lambda x, t: torch.tanh(weight * x) * (1 + t), x, times)

    inputs = [noise((2, 2)), grid, torch.tensor(0.8, dtype=torch.float64)]
    assert torch.autograd.gradcheck(result, [tensor.clone().requires_grad_() for tensor in inputs])
    for times in (schedule.sigmas(4), schedule.sigmas(4).flip(0)):
        gradients = torch.func.grad(lambda *inputs: result(*inputs).square().sum(), argnums=(0, 1, 2))(
            noise(dtype=torch.float32), times, torch.tensor(0.8)
        )
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_the_amounts_of_noise_have_derivatives():
    def result(eta, gamma, scale):
        x, grid = noise((2, 2)), [1.0, 0.6, 0.2, 0.0]
        first = ode.integrate(ode.ancestral(KEY, eta, scale), field, x, grid)
        return first + ode.integrate(ode.churn(KEY, gamma, scale=scale), field, x, grid)

    amounts = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.6, 0.2, 0.9)]
    assert torch.autograd.gradcheck(result, amounts)
    nothing = [torch.tensor(value, dtype=torch.float64) for value in (0.0, 0.0, 0.0)]
    gradients = torch.func.grad(lambda *amounts: result(*amounts).sum(), argnums=(0, 1, 2))(*nothing)
    assert all(torch.isfinite(gradient) for gradient in gradients)


@MAKERS
def test_a_whole_run_compiles_to_one_graph_with_the_values_of_eager_and_vmaps_over_keys(make):
    x, grid = noise((2, 4), torch.float32), schedule.sigmas(2)

    def result(key, x):
        return ode.integrate(make(key), field, x, grid)

    torch._dynamo.reset()
    compiled = torch.compile(result, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(KEY, x), result(KEY, x))
    keys = prng.split(KEY, 3)
    many = torch.func.vmap(result, (0, None))(keys, x)
    torch.testing.assert_close(many[2], result(keys[2], x))


@MAKERS
def test_the_number_of_evaluations_is_the_counted_one(make):
    assert ode.evaluations(make(KEY), 7) == 7 * make(KEY).evaluations


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="3 keys for 2 samples"):
        ode.integrate(ode.ancestral(prng.split(KEY, 3)), field, noise((2, 2)), [1.0, 0.0])
    with pytest.raises(ValueError, match="takes a one-step method as its base, and .*ancestral carries a state"):
        stochastic.churn(KEY, base=ode.ancestral(KEY))
