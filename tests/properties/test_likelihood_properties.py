"""Properties of every divergence, likelihood and inversion."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3.core import prng
from functional_sd3.flow import ode, path, schedule
from functional_sd3.flow.analysis import likelihood

# torch itself scripts its forward-mode derivatives when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

seeds = st.integers(0, 2**31)
factors = st.floats(-3, 3)
one_step = st.sampled_from([ode.EULER, ode.MIDPOINT, ode.HEUN, ode.RALSTON, ode.RK4])
modes = st.sampled_from(["forward", "reverse"])
draws = st.sampled_from([likelihood.rademacher, prng.normal])


def normal(seed, shape=(2, 3)):
    return prng.normal(prng.key(seed), shape, torch.float64)


def bent(matrix):
    return lambda x, t: torch.tanh(x @ matrix) * (1 + path.broadcast(t, x))


@given(seeds, factors, factors, modes, st.booleans())
def test_divergence_is_linear_in_the_velocity(seed, first, second, mode, estimated):
    x, t = normal(seed), torch.tensor(0.4)
    one, other = bent(normal(seed + 1, (3, 3))), bent(normal(seed + 2, (3, 3)))
    arguments = {"mode": mode, "key": prng.key(seed) if estimated else None, "probes": 2}
    mixed = likelihood.divergence(lambda x, t: first * one(x, t) + second * other(x, t), x, t, **arguments)
    apart = [likelihood.divergence(field, x, t, **arguments) for field in (one, other)]
    torch.testing.assert_close(mixed, first * apart[0] + second * apart[1])


@given(seeds, draws, st.integers(1, 4), st.sampled_from([1, 2, None]))
def test_every_probe_is_exact_where_the_jacobian_is_a_multiple_of_one_and_probes_are_signs(seed, draw, probes, chunk):
    x = normal(seed)
    arguments = {"key": prng.key(seed), "probes": probes, "draw": draw, "chunk_size": chunk}
    actual = likelihood.divergence(lambda x, t: 0.7 * x, x, 0.5, **arguments)
    if draw is likelihood.rademacher:
        torch.testing.assert_close(actual, torch.full_like(actual, 2.1))
    else:
        assert (actual > 0).all()


@given(seeds, one_step, st.integers(1, 6), st.sampled_from(["exact", "hutchinson"]))
def test_samples_may_change_places(seed, method, steps, divergence):
    x, keys = normal(seed, (3, 4)), prng.split(prng.key(seed), 3)
    field = bent(normal(seed + 1, (4, 4)))
    arguments = {"method": method, "times": schedule.sigmas(steps), "divergence": divergence}
    order = torch.tensor([2, 0, 1])
    plain = likelihood.log_likelihood(field, x, key=keys, **arguments)
    moved = likelihood.log_likelihood(field, x[order], key=keys[order], **arguments)
    torch.testing.assert_close(moved, plain[order])


@settings(max_examples=25)
@given(seeds, factors, st.integers(20, 40))
def test_stretching_the_data_costs_the_logarithm_of_the_stretch(seed, rate, steps):
    # dx/dt = rate x: noise = e^rate x0, so p(x0) = e^(rate D) N(e^rate x0; 0, 1).
    x = normal(seed)
    actual = likelihood.log_likelihood(
        lambda x, t: rate * x, x, method=ode.RK4, times=torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    )
    exact = 3 * rate + likelihood.log_normal(math.exp(rate) * x)
    torch.testing.assert_close(actual, exact, rtol=1e-2, atol=1e-2)


@settings(max_examples=40)
@given(seeds, one_step, st.integers(2, 12), st.floats(0.3, 6.0))
def test_round_trips_come_home_on_every_grid(seed, method, steps, shift):
    x, field = normal(seed), bent(0.5 * normal(seed + 1, (3, 3)))
    grid = schedule.sigmas(steps, shift=shift).double()
    for by in (likelihood.corrected(method, tolerance=1e-12, iterations=200), likelihood.coupled(method)):
        assert (likelihood.round_trip(field, x, grid, by=by).error < 1e-9).all()


@given(seeds, one_step)
def test_nothing_touches_the_global_random_state_or_its_inputs(seed, method):
    before, x = torch.random.get_rng_state(), normal(seed)
    kept, keys = x.clone(), prng.key(seed)
    field = bent(normal(seed + 1, (3, 3)))
    arguments = {"method": method, "times": schedule.sigmas(3), "divergence": "hutchinson", "key": keys}
    first = likelihood.estimate(field, x, **arguments)
    likelihood.round_trip(field, x, schedule.sigmas(3), by=likelihood.coupled(method))
    likelihood.losses(field, x, keys, draws=2)
    assert torch.equal(likelihood.estimate(field, x, **arguments).volumes, first.volumes)
    assert torch.equal(x, kept) and torch.equal(keys, prng.key(seed))
    assert torch.equal(torch.random.get_rng_state(), before)
