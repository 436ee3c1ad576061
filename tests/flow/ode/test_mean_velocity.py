"""Steps of a mean velocity: exact on Gaussian flows in any number, inverted, resumed, mapped and compiled."""

import pytest
import torch

from functional_sd3.core import prng, transform
from functional_sd3.flow import guidance, ode, schedule
from functional_sd3.flow.ode import fixed_point

MEAN, STD = 0.7, 0.4


def spread(t):
    """Standard deviation at t of the flow from N(MEAN, STD^2)."""
    return (((1 - t) * STD) ** 2 + t**2).sqrt()


def flowed(x, t, r):
    """x_t at time r, by the flow's map."""
    wide = lambda time: time.reshape(-1, *(1,) * (x.ndim - 1)) if time.ndim else time  # noqa: E731
    t, r = wide(t), wide(r)
    return (1 - r) * MEAN + spread(r) / spread(t) * (x - (1 - t) * MEAN)


def mean_velocity(x, t, r):
    wide = (t - r).reshape(-1, *(1,) * (x.ndim - 1)) if t.ndim else t - r
    return (x - flowed(x, t, r)) / wide


NOISE = prng.normal(prng.key(0), (5, 3)).double()


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_any_number_of_steps_of_the_exact_mean_velocity_is_the_flow(steps):
    times = schedule.even(steps).double()
    states = ode.integrate(ode.MEANFLOW, mean_velocity, NOISE, times, save="all")
    for t, x in zip(times, states, strict=True):
        torch.testing.assert_close(x, flowed(NOISE, times[0], t), rtol=1e-12, atol=1e-12)
    assert [len(each) for each in ode.evaluation_times(ode.MEANFLOW, times)] == [1] * steps
    assert torch.equal(torch.cat(ode.evaluation_times(ode.MEANFLOW, times)), times[:-1])
    assert torch.equal(torch.cat(ode.evaluation_ends(ode.MEANFLOW, times)), times[1:])


def test_a_run_pauses_and_samples_may_have_grids_of_their_own():
    times = schedule.even(4).double()
    whole = ode.integrate(ode.MEANFLOW, mean_velocity, NOISE, times)
    state = ode.run(ode.MEANFLOW, mean_velocity, ode.start(ode.MEANFLOW, NOISE, times[0]), times[:3], ends=False)
    state = ode.from_tensors(ode.to_tensors(state))
    assert torch.equal(ode.run(ode.MEANFLOW, mean_velocity, state, times[2:]).x, whole)
    own = torch.stack([torch.linspace(1, 0, 4, dtype=torch.float64) ** power for power in (1, 2, 3, 4, 5)], 1)
    torch.testing.assert_close(ode.integrate(ode.MEANFLOW, mean_velocity, NOISE, own), whole, rtol=1e-12, atol=1e-12)


def test_steps_up_lead_back_exactly_by_their_inverse_and_to_first_order_without():
    times = schedule.even(3).double()
    data = ode.integrate(ode.MEANFLOW, mean_velocity, NOISE, times)
    inverse = fixed_point.inverse(ode.MEANFLOW, tolerance=1e-12)
    torch.testing.assert_close(
        ode.integrate(inverse, mean_velocity, data, times.flip(0)), NOISE, rtol=1e-10, atol=1e-10
    )
    errors = [
        (ode.integrate(ode.MEANFLOW, mean_velocity, data, schedule.even(n).double().flip(0)) - NOISE).abs().max()
        for n in (32, 64, 128)
    ]
    assert errors[2] < 0.05
    assert 1.7 < errors[0] / errors[1] < 2.3 and 1.8 < errors[1] / errors[2] < 2.2


def test_steps_are_mapped_differentiated_and_compiled():
    times = schedule.even(2).double()
    run = lambda x: ode.integrate(ode.MEANFLOW, mean_velocity, x, times)  # noqa: E731
    jacobian = torch.func.jacrev(run)(NOISE[:1])
    torch.testing.assert_close(jacobian[0, 0, 0, 0], spread(times[-1]) / spread(times[0]), rtol=1e-10, atol=0)
    mapped = torch.func.vmap(lambda x: run(x[None])[0])(NOISE)
    torch.testing.assert_close(mapped, run(NOISE))
    compiled = transform.compile(run, backend="aot_eager")
    torch.testing.assert_close(compiled(NOISE), run(NOISE))


def test_a_guidance_that_carries_a_state_guides_mean_velocities():
    apg = guidance.apg(3.0, momentum=-0.5)
    method = guidance.with_carry(ode.MEANFLOW, apg)
    times = schedule.even(3).double()
    ends = iter(times[1:])

    def velocity(x, t, r, carry):
        assert r == next(ends)
        fields = {name: scale * mean_velocity(x, t, r) for name, scale in zip(apg.needs, (1.0, 0.9), strict=True)}
        return apg.combine(fields, x, t, carry)

    assert torch.isfinite(ode.integrate(method, velocity, NOISE[:, :, None, None], times)).all()
    assert next(ends, None) is None


def test_velocities_of_one_time_have_no_ends():
    with pytest.raises(ValueError, match="euler evaluates velocities of one time"):
        ode.evaluation_ends(ode.EULER, schedule.even(2))
    assert ode.named("meanflow") is ode.MEANFLOW and not ode.EULER.mean
