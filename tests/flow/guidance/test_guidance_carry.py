"""Guidance that carries a state: its carry is a part of the run's, and of nothing else."""

import threading

import pytest
import torch

from functional_sd3.core import prng
from functional_sd3.flow import guidance, ode, schedule
from functional_sd3.flow.guidance.combine import clip_norm, scale_parallel
from functional_sd3.flow.ode.method import no_carry

X = prng.normal(prng.key(0), (3, 2, 4))
TIMES = schedule.sigmas(6)
FIELDS = {"positive": lambda x, t: torch.tanh(2 * x) + t, "negative": lambda x, t: 0.5 * x - t * torch.cos(x)}
APG = guidance.apg(5.0, momentum=-0.5, longest=2.0)
METHODS = ["euler", "heun_edm", "dpmpp_2m", "rk4"]
close = torch.testing.assert_close


def run(method=ode.EULER, guiding=APG, x=X, times=TIMES, **options):
    return ode.integrate(
        guidance.with_carry(method, guiding), guidance.guided_with_carry(guiding, FIELDS), x, times, **options
    )


def test_the_momentum_is_the_sum_of_past_differences_each_times_a_power():
    beta, x, differences, carry = -0.4, X, [], APG.init(X, TIMES[0])
    guiding = guidance.apg(3.0, momentum=beta, eta=1.0, longest=None)
    for t in TIMES[:-1]:
        positive, negative = FIELDS["positive"](x, t), FIELDS["negative"](x, t)
        differences.append(positive - negative)
        v, carry = guiding.combine({"positive": positive, "negative": negative}, x, t, carry)
        momentum = sum(beta**age * difference for age, difference in enumerate(reversed(differences)))
        close(carry, momentum)
        close(v, negative + 3.0 * momentum)
        x = x - 0.1 * v


def test_a_run_by_eulers_method_is_the_fold_written_out():
    x, momentum = X, torch.zeros_like(X)
    for t, following in zip(TIMES[:-1], TIMES[1:], strict=True):
        positive, negative = FIELDS["positive"](x, t), FIELDS["negative"](x, t)
        momentum = positive - negative - 0.5 * momentum
        update = scale_parallel(clip_norm(momentum, 2.0), positive, 0.0)
        x = x + (following - t) * (negative + 5.0 * update)
    close(run(), x)
    assert (run() - run(guiding=guidance.apg(5.0, momentum=0.5, longest=2.0))).abs().max() > 1e-2


@pytest.mark.parametrize("name", METHODS)
def test_a_guidance_that_forgets_gives_the_run_of_its_velocity(name):
    method, plain = ode.METHODS[name], guidance.zero_star(4.0)
    expected = ode.integrate(method, guidance.guided(plain, FIELDS), X, TIMES)
    assert torch.equal(run(method, plain), expected)
    forgetful = guidance.apg(4.0, momentum=torch.tensor(0.0), longest=2.0)
    assert forgetful.init is not no_carry and guidance.apg(4.0, momentum=0).init is no_carry
    expected = ode.integrate(method, guidance.guided(guidance.apg(4.0, momentum=0, longest=2.0), FIELDS), X, TIMES)
    assert torch.equal(run(method, forgetful), expected)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_stopped_written_to_disk_and_taken_up_again_is_the_run_to_the_bit(name, stop, tmp_path):
    from safetensors.torch import load_file, save_file

    method, velocity = guidance.with_carry(ode.METHODS[name], APG), guidance.guided_with_carry(APG, FIELDS)
    state = ode.run(method, velocity, ode.start(method, X, TIMES[0]), TIMES[: stop + 1], ends=False)
    save_file({name: leaf.clone() for name, leaf in ode.to_tensors(state).items()}, tmp_path / "state.safetensors")
    again = ode.from_tensors(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(ode.run(method, velocity, again, TIMES[stop:]).x, run(ode.METHODS[name]))


def test_interleaved_runs_equal_separate_ones_also_from_two_threads():
    method, velocity = guidance.with_carry(ode.DPMPP_2M, APG), guidance.guided_with_carry(APG, FIELDS)
    starts = [X, X.flip(0) + 1]
    expected = [run(ode.DPMPP_2M, x=x) for x in starts]
    states = [ode.start(method, x, TIMES[0]) for x in starts]
    for step in range(6):
        states = [ode.run(method, velocity, state, TIMES[step : step + 2]) for state in states]
    assert all(torch.equal(state.x, whole) for state, whole in zip(states, expected, strict=True))

    actual = {}
    threads = [
        threading.Thread(target=lambda i=i: actual.update({i: ode.integrate(method, velocity, starts[i], TIMES)}))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(actual[i], expected[i]) for i in range(2))


def test_a_sample_of_a_run_with_a_carry_does_not_depend_on_its_batch():
    batched = run()
    for i in range(3):
        close(run(x=X[i : i + 1])[0], batched[i])


def test_a_run_with_a_carry_is_mapped_differentiated_and_compiled_over_its_numbers():
    def end(numbers):
        guiding = guidance.apg(numbers[0], momentum=numbers[1], eta=numbers[2], longest=numbers[3])
        return run(guiding=guiding, x=X.to(numbers.dtype))

    numbers = torch.tensor([5.0, -0.5, 0.2, 2.0])
    expected = end(numbers)
    close(expected, run(guiding=guidance.apg(5.0, momentum=-0.5, eta=0.2, longest=2.0)))
    more = torch.stack([numbers, numbers + 0.3])
    close(torch.func.vmap(end)(more), torch.stack([end(each) for each in more]))
    close(torch.compile(end, fullgraph=True, backend="aot_eager")(numbers), expected)
    loss = lambda numbers: end(numbers).square().sum()  # noqa: E731
    gradient = torch.func.grad(loss)(numbers.double())
    for i in range(4):
        step = torch.zeros(4).double()
        step[i] = 1e-5
        close(gradient[i], (loss(numbers.double() + step) - loss(numbers.double() - step)) / 2e-5, rtol=1e-4, atol=1e-4)
        assert abs(gradient[i]) > 1e-3


def test_the_momentum_accumulates_before_its_first_use_and_is_unchanged_outside_of_an_interval():
    by_name = {name: field(X, TIMES[0]) for name, field in FIELDS.items()}
    difference = by_name["positive"] - by_name["negative"]
    mixed = guidance.mixed_apg(4.0, 8.0, momentum=-0.5, first=2)
    carry, start = mixed.init(X, TIMES[0]), torch.zeros_like(X)
    for step in range(4):
        v, carry = guidance.at(mixed, step, 10).combine(by_name, X, TIMES[0], carry)
        start = difference - 0.5 * start
        close(carry, start)
        by_cfg = guidance.cfg(4.0).combine(by_name, X, TIMES[0], [])[0]
        assert torch.allclose(v, by_cfg) == (step < 2)
    limited = guidance.interval(APG, 0.5, 1.0)
    assert limited.init is APG.init
    v, rested = guidance.at(limited, 0, 10).combine(by_name, X, TIMES[0], carry)
    assert rested is carry and v is by_name["positive"]


def test_a_carry_is_not_left_out_by_mistake():
    with pytest.raises(ValueError, match="carries a state: use `guided_with_carry`"):
        guidance.guided(APG, FIELDS)
    with pytest.raises(ValueError, match="dopri5 may reject steps"):
        guidance.with_carry(ode.DOPRI5, APG)
    other = APG._replace(init=lambda x, t: {"own": x})
    with pytest.raises(ValueError, match="carry different states"):
        guidance.windowed(APG, other, guidance.fraction(0.0, 0.5))
