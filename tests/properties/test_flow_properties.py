"""Properties of every grid, path, guidance and run."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from functional_sd3.core import prng
from functional_sd3.flow import guidance, ode, path, schedule
from functional_sd3.flow.ode import adaptive, dense

steps = st.integers(1, 120)
shifts = st.floats(0.2, 12.0)
seeds = st.integers(0, 2**31)
times = st.floats(0.0, 1.0)
inner_times = st.floats(0.01, 0.99)
methods = st.sampled_from(list(ode.METHODS.values()))


def normal(seed, shape=(2, 3, 4)):
    return prng.normal(prng.key(seed), shape, torch.float64)


@given(steps, shifts, st.booleans())
def test_grids_descend_strictly_from_one_to_zero(steps, shift, double_shift):
    grid = schedule.sigmas(steps, shift=shift, double_shift=double_shift)
    assert len(grid) == steps + 1 and grid[0] == 1 and grid[-1] == 0
    assert (grid.diff() < 0).all()


@given(st.floats(1e-6, 1.0), shifts, shifts)
def test_shifts_compose_by_multiplication_and_undo_one_another(sigma, first, second):
    sigma = torch.tensor(sigma, dtype=torch.float64)
    both = schedule.shift(schedule.shift(sigma, first), second)
    torch.testing.assert_close(both, schedule.shift(sigma, first * second))
    torch.testing.assert_close(schedule.shift(schedule.shift(sigma, first), 1 / first), sigma)


@given(steps, times)
def test_a_part_of_a_grid_ends_where_the_grid_ends_and_is_longer_the_stronger(steps, strength):
    grid = schedule.sigmas(steps)
    part = schedule.partial(grid, strength)
    assert part[-1] == 0 and strength * steps - 1e-5 <= len(part) - 1 < strength * steps + 1
    assert torch.equal(grid[-len(part) :], part)


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=30))
def test_every_vector_of_logits_is_a_grid(logits):
    grid = schedule.learned(torch.tensor(logits, dtype=torch.float64))
    assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() <= 1e-12).all() and (grid >= -1e-12).all()


@given(seeds, inner_times)
def test_noise_to_data_to_noise_is_the_identity_of_the_path(seed, t):
    x0, noise = normal(seed), normal(seed + 1)
    x, v = path.interpolate(x0, noise, t), path.target(x0, noise)
    torch.testing.assert_close(path.denoised(x, v, t), x0)
    torch.testing.assert_close(path.noise_of(x, v, t), noise)
    torch.testing.assert_close(path.interpolate(path.denoised(x, v, t), path.noise_of(x, v, t), t), x)
    torch.testing.assert_close(path.velocity_of(x, x0, t), v, rtol=1e-6, atol=1e-8)


@given(methods, seeds, steps, shifts)
def test_every_method_is_exact_along_a_straight_path(method, seed, steps, shift):
    x0, noise = normal(seed), normal(seed + 1)
    grid = schedule.sigmas(min(steps, 12), shift=shift)
    torch.testing.assert_close(ode.integrate(method, lambda x, t: noise - x0, noise, grid), x0)
    torch.testing.assert_close(ode.integrate(method, lambda x, t: noise - x0, x0, grid.flip(0)), noise)


@given(methods, seeds, st.floats(-2, 2))
def test_runs_of_a_linear_field_are_linear_in_their_start(method, seed, factor):
    matrix, x, y = normal(seed, (3, 3)) * 0.5, normal(seed + 1, (2, 3)), normal(seed + 2, (2, 3))

    def result(x):
        return ode.integrate(method, lambda x, t: (x @ matrix) * (1 + t), x, schedule.sigmas(5))

    torch.testing.assert_close(result(x + factor * y), result(x) + factor * result(y), rtol=1e-8, atol=1e-8)


@given(methods, seeds, st.integers(1, 7))
def test_a_run_in_two_parts_is_the_run_to_the_bit(method, seed, stop):
    x, grid = normal(seed), schedule.sigmas(8)

    def velocity(x, t):
        return torch.sin(3 * x) + t * x.flip(-1)

    first = ode.run(method, velocity, ode.start(method, x, grid[0]), grid[: stop + 1], ends=False)
    second = ode.run(method, velocity, first, grid[stop:])
    assert torch.equal(second.x, ode.integrate(method, velocity, x, grid))


@given(st.sampled_from(list(ode.ADAPTIVE.values())), seeds, st.floats(0.05, 1.0))
def test_adaptive_methods_are_exact_along_a_straight_path_in_one_step_as_long_as_it_is(method, seed, end):
    x0, noise = normal(seed), normal(seed + 1)
    solution = adaptive.solve(method, lambda x, t: noise - x0, noise, [end, 0.0], h=2.0, keep=True)
    torch.testing.assert_close(solution.x[-1], noise - end * (noise - x0))
    assert solution.accepted.tolist() == [1, 1] and solution.rejected.tolist() == [0, 0]
    middle = dense.evaluate(solution.dense, end / 3)
    torch.testing.assert_close(middle, noise - 2 / 3 * end * (noise - x0))


@given(st.sampled_from(list(ode.ADAPTIVE.values())), seeds, st.lists(times, min_size=1, max_size=6, unique=True))
def test_adaptive_runs_are_the_same_for_any_times_between_and_in_any_batch(method, seed, asked):
    x = normal(seed) * torch.tensor([0.1, 4.0]).double()[:, None, None]

    def velocity(x, t):
        return torch.sin(3 * x) + path.broadcast(t, x) * x.flip(-1)

    grid = [1.0, *sorted(asked, reverse=True), 0.0]
    whole = adaptive.solve(method, velocity, x, grid, rtol=1e-4, atol=1e-4)
    for i in range(2):
        alone = adaptive.solve(method, velocity, x[i : i + 1], [1.0, 0.0], rtol=1e-4, atol=1e-4)
        assert torch.equal(alone.x[-1][0], whole.x[-1][i]) and alone.evaluations[0] == whole.evaluations[i]


@given(st.sampled_from(list(ode.STOCHASTIC.values())), seeds, st.integers(1, 7))
def test_a_stochastic_run_in_two_parts_is_the_run_to_the_bit(make, seed, stop):
    x, grid, method = normal(seed), schedule.sigmas(8), make(prng.key(seed))
    first = ode.run(method, lambda x, t: torch.sin(x), ode.start(method, x, grid[0]), grid[: stop + 1], ends=False)
    second = ode.run(method, lambda x, t: torch.sin(x), first, grid[stop:])
    assert torch.equal(second.x, ode.integrate(method, lambda x, t: torch.sin(x), x, grid))


@given(seeds, st.floats(-10, 10), st.floats(-10, 10))
def test_guidance_is_affine_in_its_scale_and_the_identity_at_one(seed, first, second):
    x, t = normal(seed), torch.tensor(0.5)
    at = {
        scale: guidance.classifier_free(lambda x, t: torch.sin(x), lambda x, t: t * x, scale)(x, t)
        for scale in (first, second, (first + second) / 2, 1.0)
    }
    torch.testing.assert_close((at[first] + at[second]) / 2, at[(first + second) / 2])
    torch.testing.assert_close(at[1.0], torch.sin(x))


@given(seeds, st.floats(-5, 5))
def test_guidance_between_equal_velocities_does_nothing(seed, scale):
    x, t = normal(seed), torch.tensor(0.5)
    torch.testing.assert_close(guidance.classifier_free(lambda x, t: x, lambda x, t: x, scale)(x, t), x)


@given(seeds)
def test_nothing_touches_the_global_random_state_or_the_default_dtype(seed):
    before = torch.random.get_rng_state()
    t = path.logit_normal(prng.key(seed), (4,)), path.mode(prng.key(seed), (4,)), path.cosine_map(prng.key(seed), (4,))
    ode.integrate(ode.DPMPP_2M, lambda x, t: x, normal(seed), schedule.sigmas(4))
    assert torch.equal(torch.random.get_rng_state(), before) and torch.get_default_dtype() == torch.float32
    assert all(((time >= 0) & (time <= 1)).all() for time in t)
