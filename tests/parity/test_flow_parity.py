"""Grids and steps against diffusers' flow-matching schedulers, and DPM-Solver++(2M) against its formula in numpy."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

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


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_spaced_grids_equal_diffusers(option, shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift, **{option: True})
    for steps in (1, 2, 5, 28, 50):
        theirs.set_timesteps(steps)
        ours = schedule.from_config(schedule.Config(shift=shift, **{option: True}), steps)
        torch.testing.assert_close(ours, theirs.sigmas, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_dynamic_and_terminal_shifts_equal_diffusers(kind, terminal):
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, shift_terminal=terminal)
    config = schedule.Config(use_dynamic_shifting=True, time_shift_type=kind, shift_terminal=terminal)
    for steps in (2, 8, 28):
        for mu in (0.5, 1.15, 2.0):
            theirs.set_timesteps(steps, mu=mu)
            ours = schedule.from_config(config, steps, mu=mu)
            torch.testing.assert_close(ours, theirs.sigmas, rtol=1.2e-7, atol=0)


def test_inverted_grids_equal_diffusers():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True)
    theirs.set_timesteps(9)
    torch.testing.assert_close(schedule.from_config(schedule.Config(invert_sigmas=True), 9), theirs.sigmas)


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
