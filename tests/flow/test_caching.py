"""Runs whose velocity is extrapolated in some of their steps."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3.core import prng, transform
from functional_sd3.flow import caches, caching, guidance, ode, schedule
from functional_sd3.flow.caches import Extrapolate, FirstBlock, TeaCache, Tolerance
from functional_sd3.flow.path import broadcast
from tests.flow.ode.flows import field, gaussian_field, noise

STEPS = 10
TIMES = schedule.sigmas(STEPS).double()
X = noise((3, 4))
SLOPE, OFFSET, CURVE = noise((3, 4), seed=1), noise((3, 4), seed=2), noise((3, 4), seed=3)
STOCHASTIC = {name: make(prng.key(7)) for name, make in ode.STOCHASTIC.items()}
ALL = {**ode.METHODS, **STOCHASTIC}
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def run(cache, velocity=gaussian_field, method=ode.EULER, x=X, times=TIMES, **options):
    cached = caching.with_cache(method, cache, of_data=method.name in ode.STOCHASTIC)
    return ode.integrate(cached, caching.stepwise(velocity, cache, len(times) - 1), x, times, **options)


def counted(velocity):
    calls = []

    def counting(x, t):
        calls.append(t)
        return velocity(x, t)

    return counting, calls


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", list(ode.METHODS))
def test_a_velocity_that_is_a_polynomial_in_time_is_extrapolated_exactly_by_its_order(order, name):
    def velocity(x, t):
        t = broadcast(t, x)
        return OFFSET + (order > 0) * t * SLOPE + (order > 1) * t**2 * CURVE + 0 * x

    cache, method = Extrapolate(every=3, order=order), ode.METHODS[name]
    expected = ode.integrate(method, velocity, X, TIMES)
    close(run(cache, velocity, method), expected)
    if order:
        lower = run(Extrapolate(every=3, order=order - 1), velocity, method)
        assert (lower - expected).abs().max() > 1e-3


@pytest.mark.parametrize("order", [1, 2])
def test_a_fitted_slope_is_all_of_it_on_a_polynomial_and_none_of_it_on_a_velocity_that_turns_back(order):
    def velocity(x, t):
        t = broadcast(t, x)
        return OFFSET + t * SLOPE + (order > 1) * t**2 * CURVE + 0 * x

    cache = Extrapolate(3, order, fitted=True)
    close(run(cache, velocity), ode.integrate(ode.EULER, velocity, X, TIMES))
    # Of the three velocities 0, 1, 0 the last turns back, so that it is held.
    turning = ode.Stepwise(lambda step: lambda x, t: torch.ones_like(x) * float(step == 1))
    cached = caching.with_cache(ode.EULER, Extrapolate(3, 1, fitted=True))
    steps = caching.cached_steps(
        Extrapolate(3, 1, fitted=True), [caching.CachedStep(turning.at(step)) for step in range(5)], [0]
    )
    state = ode.run(cached, steps, ode.start(cached, X, TIMES[0]), TIMES[:4], ends=False)
    assert state.carry["cache"]["share"].tolist() == [0.0] * 3
    close(ode.run(cached, steps.after(3), state, TIMES[3:5], ends=False).x, state.x)


def test_the_fitted_share_is_each_samples_own_and_the_best_between_none_and_all():
    points = [caching.Point(value, torch.tensor(t).double()) for value, t in ((SLOPE, 0.5), (OFFSET, 0.75))]
    actual = torch.stack([SLOPE[0] + 0.3 * (SLOPE - OFFSET)[0], SLOPE[1] - (SLOPE - OFFSET)[1], 9 * SLOPE[2]])
    share = caching._best_share(points, caching.Point(actual, torch.tensor(0.25).double()), 3)
    difference = (SLOPE - OFFSET)[2]
    best = ((8 * SLOPE[2] * difference).sum() / (difference**2).sum()).clamp(0, 1)
    close(share, torch.tensor([0.3, 0.0, best.item()], dtype=torch.float64))


def test_eulers_method_with_a_held_velocity_is_eulers_method_on_the_computed_steps():
    computed = [index for index, each in enumerate(caches.computed_steps(Extrapolate(3, 0), STEPS)) if each]
    close(run(Extrapolate(3, 0)), ode.integrate(ode.EULER, gaussian_field, X, [*TIMES[computed], TIMES[-1]]))


@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("cache", [Extrapolate(every=1), Tolerance(0.0)])
def test_a_cache_that_leaves_out_nothing_changes_no_bit(name, cache):
    assert torch.equal(run(cache, field, ALL[name]), ode.integrate(ALL[name], field, X, TIMES))


@pytest.mark.parametrize("name", ["euler", "heun", "rk4", "dpmpp_2m", "adams_bashforth_3"])
def test_a_step_that_is_left_out_has_none_of_its_evaluations(name):
    cache, method = Extrapolate(every=2), ode.METHODS[name]
    velocity, calls = counted(field)
    run(cache, velocity, method)
    times = ode.evaluation_times(method, TIMES)
    computed = caches.computed_steps(cache, STEPS)
    assert sum(computed) == 6
    expected = [t for each, at in zip(computed, times, strict=True) if each for t in at]
    assert [t.item() for t in calls] == [t.item() for t in expected]


def test_the_higher_order_is_nearer_where_the_velocity_is_smooth():
    times = torch.linspace(1, 0, 41, dtype=torch.float64)
    exact = ode.integrate(ode.EULER, gaussian_field, X, times)
    errors = [(run(Extrapolate(2, order), times=times) - exact).abs().max().item() for order in (0, 1, 2)]
    assert errors[0] > 10 * errors[1] > 50 * errors[2]


@pytest.mark.parametrize(
    "cache", [Extrapolate(2), Extrapolate(3, 2), Extrapolate(2, fitted=True), Tolerance(0.05), Tolerance(0.2, order=0)]
)
@pytest.mark.parametrize("name", ["euler", "heun_edm", "unipc", "adams_bashforth_3", "euler_ancestral", "heun_churn"])
def test_a_run_that_is_saved_after_any_step_goes_on_to_the_same_bits(cache, name):
    method = ALL[name]
    cached = caching.with_cache(method, cache, of_data=name in ode.STOCHASTIC)
    steps = caching.stepwise(field, cache, STEPS)
    whole = ode.integrate(cached, steps, X, TIMES)
    for pause in range(1, STEPS):
        state = ode.run(cached, steps, ode.start(cached, X, TIMES[0]), TIMES[: pause + 1], ends=False)
        state = ode.from_tensors(ode.to_tensors(state))
        assert torch.equal(ode.run(cached, steps.after(pause), state, TIMES[pause:]).x, whole), pause


@pytest.mark.parametrize(
    "cache", [Extrapolate(2), Extrapolate(2, fitted=True), Tolerance(0.05), Tolerance(0.3, order=0)]
)
def test_a_sample_is_the_same_in_any_batch_and_under_vmap(cache):
    together = run(cache, field)
    alone = torch.cat([run(cache, field, x=x[None]) for x in X])
    close(together, alone)
    mapped = torch.func.vmap(lambda x: run(cache, field, x=x[None])[0])(X)
    close(mapped, alone)
    if isinstance(cache, Tolerance):
        assert (alone - ode.integrate(ode.EULER, field, X, TIMES)).abs().max() > 1e-4


def test_samples_that_decide_differently_are_computed_together_and_each_keeps_its_decision():
    # The second sample's velocity jumps at every step; the first's is linear in time, but for one step that it skips.
    def velocity(x, t):
        return torch.stack([SLOPE[0] * t + 5.0 * (t == TIMES[5]), SLOPE[0] * torch.sin(1e4 * t)])

    counting, calls = counted(velocity)
    x = torch.zeros(2, 4, dtype=torch.float64)
    result = run(Tolerance(1e-6, longest=20), counting, x=x)
    assert len(calls) == STEPS
    close(result[1], ode.integrate(ode.EULER, velocity, x, TIMES)[1])
    close(result[0], ode.integrate(ode.EULER, lambda x, t: SLOPE * t, X * 0, TIMES)[0])


def test_a_velocity_without_error_is_left_out_as_long_as_is_allowed():
    for longest, expected in ((1, 3 + 3 + 1), (2, 3 + 2 + 1), (20, 3 + 1)):
        velocity, calls = counted(lambda x, t: SLOPE * t)
        run(Tolerance(1e-6, longest=longest), velocity)
        assert len(calls) == expected, longest


def test_the_measured_error_is_scaled_by_the_distance_to_the_power_of_the_order_and_one():
    times, h = torch.linspace(1, 0, 11, dtype=torch.float64), 0.1

    def velocity(x, t):
        return torch.ones_like(x) * (100 + t**2)

    # The line through two points h apart errs by 2 h^2 a step ahead: below the tolerance, and 4 times that is above.
    counting, calls = counted(velocity)
    run(Tolerance(2.5 * h**2 / 100), counting, times=times)
    assert [round(10 * (1 - t.item())) for t in calls] == [0, 1, 2, 4, 6, 8, 9]


def test_a_smaller_tolerance_takes_more_evaluations_and_has_a_smaller_error():
    times = torch.linspace(1, 0, 41, dtype=torch.float64)
    exact = ode.integrate(ode.EULER, gaussian_field, X, times)
    errors, counts = [], []
    for tolerance in (0.03, 0.003, 0.0003):
        velocity, calls = counted(gaussian_field)
        errors.append((run(Tolerance(tolerance), velocity, times=times) - exact).abs().max().item())
        counts.append(len(calls))
    assert errors == sorted(errors, reverse=True) and counts == sorted(set(counts)) and counts[-1] < 41


def test_grids_of_different_lengths_in_a_batch_are_each_as_alone():
    grids = [schedule.sigmas(6), schedule.sigmas(STEPS)]
    stacked = schedule.stack(grids).double()
    for cache in (Extrapolate(2), Tolerance(0.05)):
        together = run(cache, field, x=X[:2], times=stacked)
        assert together.isfinite().all()
        close(together[1:], run(cache, field, x=X[1:2]))


def test_derivatives_are_the_same_by_autograd_and_torch_func_and_those_of_finite_differences():
    def loss(x, scale):
        return run(Extrapolate(2, fitted=True), lambda x, t: scale * field(x, t), x=x).sum()

    scale = torch.tensor(0.7, dtype=torch.float64)
    inputs = (X.clone().requires_grad_(), scale.clone().requires_grad_())
    by_autograd = torch.autograd.grad(loss(*inputs), inputs)
    by_func = torch.func.grad(loss, argnums=(0, 1))(X, scale)
    for one, other in zip(by_autograd, by_func, strict=True):
        close(one, other)
    difference = (loss(X, scale + 1e-6) - loss(X, scale - 1e-6)) / 2e-6
    torch.testing.assert_close(by_func[1], difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cache", [Extrapolate(2, fitted=True), Tolerance(0.05)])
def test_a_whole_run_is_one_graph_with_the_same_result(cache):
    compiled = transform.compile(lambda x: run(cache, field, x=x), backend="eager")
    close(compiled(X), run(cache, field))


def test_a_velocity_that_becomes_another_function_is_not_extrapolated_across_the_change():
    strong, weak = (lambda x, t, scale=scale: scale * SLOPE * t + OFFSET for scale in (5.0, 1.0))
    velocity = ode.Stepwise(lambda step: strong if step < 4 else weak)
    close(run(Extrapolate(4), velocity), ode.integrate(ode.EULER, velocity, X, TIMES))
    close(run(Tolerance(1e-6), velocity), ode.integrate(ode.EULER, velocity, X, TIMES))
    assert caches.computed_steps(Extrapolate(4), STEPS, (0, 4))[4:6] == [True, True]


def test_a_guidance_that_carries_a_state_follows_every_step():
    fields = {"positive": lambda x, t: SLOPE * t + OFFSET, "negative": lambda x, t: CURVE * t}
    apg = guidance.apg(5.0, momentum=-0.5, longest=2.0)
    expected = ode.integrate(guidance.with_carry(ode.EULER, apg), guidance.guided_with_carry(apg, fields), X, TIMES)
    cache = Extrapolate(3)
    step = caching.CachedStep(
        lambda x, t: {name: each(x, t) for name, each in fields.items()},
        finish=functools.partial(guidance.guided_with_carry, apg),
    )
    method = caching.with_cache(guidance.with_carry(ode.EULER, apg), cache)
    steps = caching.cached_steps(cache, [step] * STEPS, [0])
    close(ode.integrate(method, steps, X, TIMES), expected)
    state = ode.run(method, steps, ode.start(method, X, TIMES[0]), TIMES[:6], ends=False)
    state = ode.from_tensors(ode.to_tensors(state))
    assert torch.equal(ode.run(method, steps.after(5), state, TIMES[5:]).x, ode.integrate(method, steps, X, TIMES))


def test_methods_that_choose_their_steps_or_have_mean_velocities_are_refused():
    with pytest.raises(ValueError, match="dopri5 takes its steps by the errors"):
        caching.with_cache(ode.DOPRI5, Extrapolate())
    with pytest.raises(ValueError, match="mean velocity"):
        caching.with_cache(ode.MEANFLOW, Extrapolate())


CACHES = st.one_of(
    st.builds(Extrapolate, st.floats(1, 9), st.integers(0, 2), st.none() | st.integers(3, 9), st.integers(1, 5)),
    st.builds(Extrapolate, st.integers(1, 9), st.just(1), st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.booleans()),
    st.builds(Tolerance, st.floats(0, 2), st.integers(0, 2), st.integers(1, 5)),
    st.builds(FirstBlock, st.floats(0, 2), st.none() | st.integers(1, 9)),
    st.builds(TeaCache, st.floats(0, 2), st.lists(st.floats(-9, 9), min_size=1, max_size=5).map(tuple)),
)


@given(CACHES, st.integers(1, 60), st.sets(st.integers(1, 59)))
@settings(max_examples=200, deadline=None)
def test_warm_up_ends_and_changes_are_always_computed(cache, steps, changes):
    starts = sorted({0, *changes})
    computed = caches.computed_steps(cache, steps, starts)
    assert len(computed) == steps and computed[0] and computed[-1]
    least = {
        Extrapolate: getattr(cache, "order", 0) + 1 + getattr(cache, "fitted", 0),
        Tolerance: getattr(cache, "order", 0) + 2,
    }.get(type(cache), 1)
    for start in starts:
        assert all(computed[start : start + least][: next((s - start for s in starts if s > start), None)])
    if isinstance(cache, Extrapolate) and cache.every == 1:
        assert all(computed)


@given(CACHES)
@settings(max_examples=100, deadline=None)
def test_the_words_of_a_cache_are_read_as_that_cache(cache):
    assert caches.parse(caches.write(cache)) == cache


def test_the_preset_computes_half_of_the_usual_steps():
    assert caches.parse("fast") == caches.FAST
    assert sum(caches.computed_steps(caches.FAST, 28)) == 14
    for steps in range(16, 100):
        assert sum(caches.computed_steps(caches.FAST, steps)) <= steps / 2 + 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("extrapolat", "'extrapolat' must be one of extrapolate, hold, adaptive, first-block, teacache, fast"),
        ("extrapolate:evry=2", "'evry' is no option of extrapolate, which has every, order, fitted, warmup, final"),
        ("extrapolate:every=two", "every cannot be 'two', as in every=2"),
        ("extrapolate:every", "every must be given once, as every=VALUE"),
        ("hold:every=2,every=3", "every must be given once"),
        ("extrapolate:every=0.5", "at least 1: 2 computes every other step"),
        ("extrapolate:every=nan", "at least 1"),
        ("extrapolate:order=3", r"order 3 must be 0 \(hold\), 1 or 2"),
        ("extrapolate:warmup=1", "warmup 1.0 must be the number of steps that are computed, from 2 on"),
        ("extrapolate:warmup=2.5", "warmup 2.5 must be"),
        ("extrapolate:fitted=1", "fitted cannot be '1', as in fitted=yes"),
        ("extrapolate:order=0,fitted=yes", "a velocity that is held has no slope"),
        ("extrapolate:final=0", "final 0.0 must be"),
        ("adaptive:tolerance=-1", "tolerance -1.0 must be a number of at least 0"),
        ("adaptive:longest=0", "longest 0 must be at least 1"),
        ("first-block:every=2", "'every' is no option of first-block, which has threshold"),
        ("teacache:polynomial=a", "polynomial cannot be 'a', as in polynomial="),
        ("fast:every=2", "'every' is no option of fast, which has none"),
        ("interval:start=0.2", "is a guidance, not a cache: --guidance interval"),
    ],
)
def test_words_that_make_no_sense_say_what_would(text, message):
    with pytest.raises(ValueError, match=message):
        caches.parse(text)
