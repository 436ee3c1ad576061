"""Step windows and per-step scales of guidance."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from functional_sd3.core import prng
from functional_sd3.flow import guidance, ode, schedule
from tests.flow.guidance.guidances import combine, point, velocities

PARTS = st.floats(0, 1)
STEPS = st.integers(1, 60)


def inside(window, steps):
    return [step for step in range(steps) if window(step, steps)]


@given(start=PARTS, stop=PARTS, steps=STEPS)
def test_skip_layers_are_active_strictly_between_the_fractions_as_in_the_released_code(start, stop, steps):
    start, stop = sorted((start, stop))
    released = [i for i in range(steps) if i > start * steps and i < stop * steps]
    assert inside(guidance.strictly(start, stop), steps) == released


def test_the_window_of_medium_is_steps_1_to_9_of_50_and_1_to_5_of_28():
    skipping = guidance.skip_layer(guidance.cfg(4.0), (7, 8, 9))
    for steps, last in ((50, 9), (28, 5)):
        needs = [set(guidance.at(skipping, step, steps).needs) for step in range(steps)]
        assert [i for i, needed in enumerate(needs) if len(needed) == 3] == list(range(1, last + 1))
        assert all(needed == {"negative", "positive"} for needed in needs if len(needed) != 3)
        assert [part[:2] for part in guidance.segments(skipping, steps)] == [(0, 1), (1, last + 1), (last + 1, steps)]


@given(start=PARTS, middle=PARTS, stop=PARTS, steps=STEPS)
def test_fractions_of_a_run_that_meet_share_no_step_and_leave_none_out(start, middle, stop, steps):
    start, middle, stop = sorted((start, middle, stop))
    first, second = guidance.fraction(start, middle), guidance.fraction(middle, stop)
    assert inside(first, steps) + inside(second, steps) == inside(guidance.fraction(start, stop), steps)
    assert inside(guidance.fraction(0.0, 1.0), steps) == list(range(steps))


@given(steps=st.integers(1, 1000), first=st.integers(0, 1000))
@example(steps=100, first=29)
def test_a_fraction_that_is_a_whole_number_of_steps_is_that_number(steps, first):
    first = min(first, steps)
    assert inside(guidance.fraction(first / steps, 1.0), steps) == list(range(first, steps))


def test_outside_of_its_interval_guidance_is_the_prompts_velocity_and_needs_no_other():
    by_name, x_t = velocities(1), point(1)
    limited = guidance.interval(guidance.rescaled(guidance.cfg(5.0)), 0.25, 0.75)
    for step in range(8):
        now = guidance.at(limited, step, 8)
        always = guidance.rescaled(guidance.cfg(5.0)) if 2 <= step < 6 else guidance.CONDITIONAL
        assert now.needs == always.needs and not now.windows
        assert torch.equal(combine(now, by_name, *x_t), combine(always, by_name, *x_t))


def test_zero_init_needs_no_velocity_and_gives_zero_first_also_rescaled():
    by_name, x_t = velocities(1), point(1)
    for still in (
        guidance.zero_init(guidance.zero_star(5.0), 2),
        guidance.rescaled(guidance.zero_init(guidance.zero_star(5.0), 2), 0.7),
        guidance.zero_init(guidance.rescaled(guidance.zero_star(5.0), 0.7), 2),
    ):
        for step in range(2):
            now = guidance.at(still, step, 10)
            assert now.needs == {} and torch.equal(combine(now, {}, *x_t), torch.zeros_like(x_t[0]))
        assert combine(guidance.at(still, 2, 10), by_name, *x_t).abs().min() > 0
        assert [part[:2] for part in guidance.segments(still, 10)] == [(0, 2), (2, 10)]
    assert guidance.segments(guidance.zero_init(guidance.cfg(2.0), 0), 3)[0][:2] == (0, 3)


@given(bounds=st.lists(PARTS, min_size=6, max_size=6), steps=STEPS)
def test_segments_cover_the_run_in_order_and_each_is_the_guidance_of_all_its_steps(bounds, steps):
    pairs = [sorted(bounds[i : i + 2]) for i in (0, 2, 4)]
    nested = guidance.interval(guidance.skip_layer(guidance.cfg(4.0), (1,), 2.0, *pairs[0]), *pairs[1])
    nested = guidance.zero_init(guidance.rescaled(guidance.perturbed(nested, (2,), 1.0, *pairs[2])), 1)
    parts = guidance.segments(nested, steps)
    assert [step for first, stop, _ in parts for step in range(first, stop)] == list(range(steps))
    for first, stop, now in parts:
        assert not now.windows and now.at is None
        for step in range(first, stop):
            assert guidance.at(nested, step, steps).needs == now.needs


def test_a_window_inside_of_another_is_active_where_both_are():
    twice = guidance.interval(guidance.skip_layer(guidance.cfg(4.0), (1,), 2.0, 0.0, 1.0), 0.5, 1.0)
    assert [len(guidance.at(twice, step, 4).needs) for step in range(4)] == [1, 1, 3, 3]
    assert len(guidance.at(guidance.skip_layer(guidance.cfg(4.0), (1,), 2.0, 0.0, 1.0), 0, 4).needs) == 2


@pytest.mark.parametrize("step", range(4))
def test_what_is_added_to_guidance_in_a_window_is_added_inside_and_outside_of_it(step):
    by_name, x_t = velocities(3), point(3)
    limited = guidance.interval(guidance.cfg(5.0), 0.25, 0.75)
    more = guidance.composed(guidance.perturbed(limited, (1,), 1.5), (object(), 2.0))
    below = combine(guidance.cfg(5.0) if step in (1, 2) else guidance.CONDITIONAL, by_name, *x_t)
    added = 1.5 * (by_name["positive"] - by_name["perturbed_layers (1,)"])
    added = added + 2.0 * (by_name["prompt 1"] - by_name["negative"])
    torch.testing.assert_close(combine(guidance.at(more, step, 4), by_name, *x_t), below + added)
    rescaled = combine(guidance.at(guidance.rescaled(more, 1.0), step, 4), by_name, *x_t)
    torch.testing.assert_close(rescaled.flatten(1).std(1), by_name["positive"].flatten(1).std(1))


def test_guidance_that_changes_from_step_to_step_is_not_taken_for_one_that_does_not():
    x, t = point(2)
    fields = dict.fromkeys(velocities(2), lambda x, t: x)
    limited = guidance.interval(guidance.cfg(5.0), 0.0, 0.5)
    with pytest.raises(ValueError, match="changes from step to step"):
        guidance.guided(limited, fields)(x, t)
    assert torch.equal(guidance.guided(guidance.at(limited, 3, 4), fields)(x, t), x)


def test_an_interval_of_times_is_that_of_the_steps_that_start_in_it():
    times = schedule.sigmas(28)
    start, stop = guidance.step_fractions(times, 0.3, 0.9)
    begins = times[inside(guidance.fraction(start, stop), 28)]
    assert ((begins > 0.3) & (begins <= 0.9)).all()
    assert len(begins) == ((times[:-1] > 0.3) & (times[:-1] <= 0.9)).sum() > 5
    # The interval is open at its low end, and closed at its high one.
    assert guidance.step_fractions(torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), 0.25, 0.75) == (0.25, 0.75)


@pytest.mark.parametrize("ascending", [False, True])
def test_a_scale_for_each_step_holds_in_its_step(ascending):
    times = schedule.sigmas(4)
    times = times.flip(0) if ascending else times
    scales = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scale = guidance.per_step(scales, times)
    for step in range(4):
        assert scale(times[step]) == scales[step] and scale(times[step]).ndim == 0
        assert scale((times[step] + times[step + 1]) / 2) == scales[step]
    assert scale(times[4]) == 4.0
    assert torch.equal(scale(times[[0, 3, 1]]), scales[[0, 3, 1]])
    of_samples = guidance.per_step(torch.stack([scales, -scales], 1), times)
    assert torch.equal(of_samples(times[2]), torch.tensor([3.0, -3.0]))
    assert torch.equal(of_samples(times[[2, 1]]), torch.tensor([3.0, -2.0]))
    assert torch.equal(guidance.per_step(scales[:, None], times)(times[[2, 1]]), torch.tensor([3.0, 2.0]))
    with pytest.raises(ValueError, match="3 scales for 4 steps"):
        guidance.per_step(scales[:3], times)


def test_a_run_with_a_scale_for_each_step_is_the_steps_one_after_the_other_and_is_differentiated_in_each():
    times, scales = schedule.sigmas(4), torch.tensor([6.0, 4.0, 2.0, 0.5])
    x = prng.normal(prng.key(0), (2, 3))
    fields = {"positive": lambda x, t: torch.tanh(x) + t, "negative": lambda x, t: 0.5 * x - t}

    def run(scales):
        velocity = guidance.guided(guidance.cfg(guidance.per_step(scales, times)), fields)
        return ode.integrate(ode.EULER, velocity, x, times)

    expected = x
    for step in range(4):
        velocity = guidance.classifier_free(fields["positive"], fields["negative"], scales[step])
        expected = ode.integrate(ode.EULER, velocity, expected, times[step : step + 2])
    torch.testing.assert_close(run(scales), expected)
    assert (torch.func.jacrev(run)(scales).abs().amax((0, 1)) > 1e-3).all()
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(scales), expected)
    velocity = guidance.classifier_free(*fields.values(), guidance.per_step(scales, times))
    torch.testing.assert_close(ode.integrate(ode.EULER, velocity, x, times), expected)


@pytest.mark.parametrize("start, stop", [(-0.1, 0.5), (0.5, 1.1), (0.6, 0.5), (float("nan"), 1.0)])
def test_windows_outside_of_the_run_are_refused(start, stop):
    for make in (
        lambda: guidance.interval(guidance.cfg(2.0), start, stop),
        lambda: guidance.skip_layer(guidance.cfg(2.0), (1,), 1.0, start, stop),
        lambda: guidance.perturbed(guidance.cfg(2.0), (1,), 1.0, start, stop),
    ):
        with pytest.raises(ValueError, match="must be 0 <= start <= stop <= 1"):
            make()
    with pytest.raises(ValueError, match="zero_init of -1 steps"):
        guidance.zero_init(guidance.cfg(2.0), -1)
