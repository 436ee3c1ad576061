"""Grids and steps against diffusers' flow-matching schedulers, and DPM-Solver++(2M) against its formula in numpy."""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from hypothesis import given
from hypothesis import strategies as st

from functional_sd3.core import prng
from functional_sd3.flow import ode, schedule

SHIFTS = (1.0, 3.0, 0.7, 2.5, 6.93)


@pytest.mark.parametrize("shift", SHIFTS)
def test_sigmas_equal_those_of_diffusers_to_the_bit_for_1_to_100_steps(shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    for steps in range(1, 101):
        theirs.set_timesteps(steps)
        ours = schedule.sigmas(steps, shift=shift)
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.sigmas), f"{steps} steps"
        assert torch.equal(schedule.from_config(schedule.Config(shift=shift), steps), theirs.sigmas), f"{steps} steps"


def test_other_sizes_of_the_training_table_equal_diffusers():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=400)
    theirs.set_timesteps(13)
    assert torch.equal(schedule.sigmas(13, train_timesteps=400), theirs.sigmas)


SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@st.composite
def settings(draw):
    """Every option of the Euler scheduler that the grid depends on, and the mu that goes with them."""
    options = {
        "shift": draw(st.sampled_from(SHIFTS) | st.floats(0.1, 12.0)),
        "use_dynamic_shifting": draw(st.booleans()),
        "time_shift_type": draw(st.sampled_from(["exponential", "linear"])),
        "shift_terminal": draw(st.none() | st.floats(0.01, 0.6)),
        "invert_sigmas": draw(st.booleans()),
    }
    spacing = draw(st.none() | st.sampled_from(SPACINGS))
    if spacing:
        options[spacing] = True
    count = draw(st.sampled_from([1000]) | st.integers(20, 3000))
    mu = draw(st.floats(0.05, 4.0)) if options["use_dynamic_shifting"] else None
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=count, **options)
    return theirs, schedule.Config(train_timesteps=count, **options), mu, spacing


def assert_same_grid(ours, theirs, spacing):
    # Their table may begin at 1 + 1.2e-7, which is no time.
    theirs = theirs.clamp(0, 1)
    # Powers and exponentials may differ in the last bit of float64 between numpy and torch.
    same = (
        torch.equal(ours, theirs) if spacing in (None, "use_beta_sigmas") else torch.allclose(ours, theirs, 1.2e-7, 0)
    )
    assert ours.dtype == torch.float32 and same, (ours, theirs)


@given(settings(), st.integers(2, 100))
def test_grids_of_every_combination_of_options_equal_those_of_diffusers_to_the_bit(setting, steps):
    theirs, config, mu, spacing = setting
    theirs.set_timesteps(steps, mu=mu)
    assert_same_grid(schedule.from_config(config, steps, mu=mu), theirs.sigmas, spacing)


@given(settings(), st.lists(st.floats(0.001, 0.999), min_size=2, max_size=40, unique=True))
def test_a_users_own_sigmas_are_treated_as_diffusers_treats_them(setting, sigmas):
    theirs, config, mu, spacing = setting
    sigmas = sorted(sigmas, reverse=True)
    theirs.set_timesteps(sigmas=sigmas, mu=mu)
    assert_same_grid(schedule.from_levels(config, sigmas, mu=mu), theirs.sigmas, spacing)


@given(st.floats(0.1, 12.0), st.integers(20, 3000), st.integers(1, 100))
def test_grids_of_the_heun_scheduler_are_those_of_the_euler_scheduler(shift, count, steps):
    theirs = FlowMatchHeunDiscreteScheduler(shift=shift, num_train_timesteps=count)
    theirs.set_timesteps(steps)
    ours = schedule.from_config(schedule.Config(shift=shift, train_timesteps=count), steps)
    assert torch.equal(ours, torch.cat([theirs.sigmas[:1], theirs.sigmas[1::2]]).clamp(0, 1))


@given(st.integers(16, 20_000), st.floats(0.1, 1.0), st.floats(1.0, 3.0))
def test_the_mu_of_a_resolution_is_that_of_diffusers_pipelines(tokens, base, most):
    config = schedule.Config(use_dynamic_shifting=True, base_shift=base, max_shift=most)
    assert schedule.resolution_mu(config, tokens) == calculate_shift(tokens, 256, 4096, base, most)


def diffusers_steps(steps, strength):
    pipeline = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipeline.scheduler.set_timesteps(steps)
    return StableDiffusion3Img2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")[1]


@pytest.mark.parametrize(("steps", "strength"), [(50, 0.6), (28, 0.6), (20, 0.3), (7, 0.99), (4, 1.0), (50, 0.2)])
def test_the_part_of_a_grid_of_a_strength_is_that_of_diffusers_image_to_image(steps, strength):
    part = schedule.partial(schedule.sigmas(steps), strength)
    assert len(part) - 1 == diffusers_steps(steps, strength)


@given(st.integers(1, 200), st.integers(0, 100))
def test_a_part_of_hundredths_is_exact_where_diffusers_may_take_a_step_more(steps, hundredths):
    grid = schedule.sigmas(steps)
    kept = len(schedule.partial(grid, hundredths / 100)) - 1
    assert kept == math.ceil(Fraction(hundredths * steps, 100))
    assert diffusers_steps(steps, hundredths / 100) - kept in (0, 1)


def test_fifty_six_hundredths_of_fifty_steps_are_28_where_diffusers_takes_29():
    assert diffusers_steps(50, 0.56) == 29 and len(schedule.partial(schedule.sigmas(50), 0.56)) - 1 == 28


def velocity(x, t):
    return torch.tanh(x) * (1 + t) - 0.3 * x.roll(1, -1)


def chain(scheduler, x):
    """The loop of diffusers' pipelines."""
    evaluations = 0
    for timestep in scheduler.timesteps:
        x = scheduler.step(velocity(x, timestep / 1000), timestep, x, return_dict=False)[0]
        evaluations += 1
    return x, evaluations


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_euler_equals_the_chain_of_diffusers_steps(steps):
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(steps)
    x = prng.normal(prng.key(1), (2, 3, 4, 4))
    expected, evaluations = chain(theirs, x)
    torch.testing.assert_close(ode.integrate(ode.EULER, velocity, x, theirs.sigmas), expected, rtol=1e-6, atol=1e-6)
    assert ode.evaluations(ode.EULER, steps) == evaluations


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_heun_edm_equals_the_chain_of_diffusers_heun_steps(steps):
    theirs = FlowMatchHeunDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(steps)
    x = prng.normal(prng.key(2), (2, 3, 4, 4))
    expected, evaluations = chain(theirs, x)
    grid = schedule.sigmas(steps)
    torch.testing.assert_close(ode.integrate(ode.HEUN_EDM, velocity, x, grid), expected, rtol=1e-5, atol=1e-6)
    assert ode.evaluations(ode.HEUN_EDM, steps) == evaluations == 2 * steps - 1
    assert torch.equal(grid, torch.cat([theirs.sigmas[:1], theirs.sigmas[1::2]]))


def dpmpp_2m_in_numpy(v, x, sigmas):
    """k-diffusion's sample_dpmpp_2m as published, on lambda = -log sigma, for a velocity v = (x - denoised) / sigma."""
    old = None
    for i in range(len(sigmas) - 1):
        d = x - sigmas[i] * v(x, sigmas[i])
        if sigmas[i + 1] == 0:
            x, old = d, d
            continue
        lam, lam_next = -np.log(sigmas[i]), -np.log(sigmas[i + 1])
        h = lam_next - lam
        aim = d
        if old is not None:
            r = (lam + np.log(sigmas[i - 1])) / h
            aim = (1 + 1 / (2 * r)) * d - 1 / (2 * r) * old
        x, old = sigmas[i + 1] / sigmas[i] * x - np.expm1(-h) * aim, d
    return x


@pytest.mark.parametrize("steps", [1, 2, 4, 28])
def test_dpmpp_2m_equals_its_formula_in_float64(steps):
    x = prng.normal(prng.key(3), (2, 6), torch.float64)
    sigmas = schedule.sigmas(steps).double()
    ours = ode.integrate(ode.DPMPP_2M, velocity, x, sigmas)
    theirs = dpmpp_2m_in_numpy(
        lambda x, t: np.tanh(x) * (1 + t) - 0.3 * np.roll(x, 1, -1), x.numpy().copy(), sigmas.numpy()
    )
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_equals_the_chain_of_diffusers_steps_on_the_same_sigmas(order, steps):
    theirs = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, solver_order=order
    )
    theirs.set_timesteps(steps)
    x = start = prng.normal(prng.key(4), (2, 3, 4, 4))
    states = [x]
    for i, timestep in enumerate(theirs.timesteps):
        # At the sigma itself: the timestep is that cut to an integer.
        x = theirs.step(velocity(x, theirs.sigmas[i]), timestep, x, return_dict=False)[0]
        states.append(x)
    ours = ode.integrate(ode.unipc(order), velocity, start, theirs.sigmas, save="all")
    # For order 3 they lower the order of the step before the last too.
    same = steps - 1 if order == 3 and steps > 2 else steps + 1
    torch.testing.assert_close(ours[:same], torch.stack(states)[:same], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_renoised_equals_stochastic_sampling_of_diffusers_with_the_same_noise(steps, monkeypatch):
    key, x = prng.key(6), prng.normal(prng.key(5), (2, 3, 4, 4))
    keys, noises = prng.fold_in(key, torch.arange(2)), []
    for _ in range(steps):
        keys, drawn = prng.split(keys).unbind(-2)
        noises.append(prng.normal(drawn, x.shape[1:]))
    queue = iter(noises)
    monkeypatch.setattr(scheduling_flow_match_euler_discrete, "randn_tensor", lambda *_, **__: next(queue))
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    theirs.set_timesteps(steps)
    expected, _ = chain(theirs, x)
    ours = ode.integrate(ode.renoised(key), velocity, x, theirs.sigmas)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
