"""Integrators: their order on flows with known solutions, explicit state, transforms, and what is refused."""

import math
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from functional_sd3.core import prng
from functional_sd3.flow import ode, schedule
from tests.flow.ode.flows import FLOWS, field, noise

# torch builds its own forward-mode rules with torch.jit.script on the first jvp.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
METHODS = pytest.mark.parametrize("method", ode.METHODS.values(), ids=ode.METHODS)


def convergence(method, flow, end, start=1.0):
    """Minus the slope of log error against log steps, from t = `start` to `end`, by least squares."""
    velocity, solution = FLOWS[flow]
    start, end = torch.tensor([start, end], dtype=torch.float64)
    x, expected = solution(noise(), start), solution(noise(), end)
    counts = [64, 128, 256] if flow == "gaussian" else [24, 48, 96]
    errors = []
    for steps in counts:
        grid = torch.linspace(start, end, steps + 1, dtype=x.dtype)
        errors.append((ode.integrate(method, velocity, x, grid) - expected).norm().item())
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@METHODS
@pytest.mark.parametrize("flow", FLOWS)
def test_the_error_falls_with_the_power_of_the_step_that_the_order_says(method, flow):
    order = convergence(method, flow, end=0.1)
    assert order > method.order - 0.2
    # The Gaussian flow happens to please the midpoint rule, which gains an order there; UniPC gains one away from 1.
    assert flow == "gaussian" or method is ode.UNIPC or order < method.order + 0.3


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("ends", [(0.9, 0.1), (0.1, 0.9)], ids=["to data", "to noise"])
def test_unipc_gains_an_order_by_its_corrector_where_log_snr_is_finite(order, flow, ends):
    start, end = ends
    actual = convergence(ode.unipc(order), flow, end, start)
    # A corrector of order 3 is followed by a predictor from its start: Euler's first step then costs the fourth order.
    assert min(order + 1, 3) - 0.2 < actual


@pytest.mark.parametrize(
    ("method", "order"),
    [(ode.EULER, 0.9), (ode.HEUN, 1.9), (ode.HEUN_EDM, 1.9), (ode.DPMPP_2M, 1.6), (ode.UNIPC, 1.9)],
    ids=lambda v: getattr(v, "name", None),
)
def test_the_order_holds_down_to_zero(method, order):
    # Even steps in t are ever longer ones in log t, which DPM-Solver++ thinks in: it loses a logarithm.
    assert convergence(method, "gaussian", end=0.0) > order


@METHODS
def test_one_step_of_a_constant_field_is_exact(method):
    x, drift = noise(), noise(seed=1)
    result = ode.integrate(method, lambda x, t: drift, x, [1.0, 0.0])
    torch.testing.assert_close(result, x - drift)


@METHODS
def test_the_number_of_evaluations_is_the_counted_one(method):
    calls = []
    ode.integrate(method, lambda x, t: calls.append(t) or x, noise(), schedule.sigmas(7))
    assert len(calls) == ode.evaluations(method, 7) >= 7


@METHODS
def test_forth_and_back_returns_to_the_start_with_small_steps(method):
    grid = torch.linspace(0, 1, 401, dtype=torch.float64)
    x = noise()
    there = ode.integrate(method, field, x, grid)
    back = ode.integrate(method, field, there, grid.flip(0))
    torch.testing.assert_close(back, x, rtol=0, atol=2e-2 if method.order == 1 else 1e-3)


def test_dpmpp_2m_ends_at_the_denoised_prediction_and_its_first_step_is_eulers():
    x, grid = noise(), schedule.sigmas(6)
    states = ode.integrate(ode.DPMPP_2M, field, x, grid, save="all")
    torch.testing.assert_close(states[1], ode.integrate(ode.EULER, field, x, grid[:2]))
    torch.testing.assert_close(states[-1], states[-2] - grid[-2] * field(states[-2], grid[-2].double()))


def test_adams_bashforth_is_exact_on_polynomials_in_time_on_uneven_grids():
    grid = torch.tensor([1.0, 0.83, 0.7, 0.41, 0.32, 0.05, 0.0], dtype=torch.float64)
    x = noise()
    for order, method in ((2, ode.AB2), (3, ode.AB3), (4, ode.AB4)):
        state = ode.run(ode.RK4, lambda x, t: t**3 * torch.ones_like(x), ode.start(ode.RK4, x, 1.0), grid[:5])

        def velocity(x, t, power=order - 1):
            return (power + 1) * t**power * torch.ones_like(x)

        history = [{"value": velocity(x, t), "t": t} for t in grid[range(3, 3 - (order - 1), -1)]]
        state = ode.State(x + grid[4] ** order, grid[4], history)
        torch.testing.assert_close(ode.run(method, velocity, state, grid[4:]).x, x, rtol=0, atol=1e-13)


@METHODS
def test_a_run_stopped_written_and_taken_up_again_is_the_whole_run_to_the_bit(method):
    x, grid = noise((2, 3, 4), torch.float32), schedule.sigmas(9)
    whole = ode.integrate(method, field, x, grid)
    for stop in range(1, 9):
        state = ode.run(method, field, ode.start(method, x, grid[0]), grid[: stop + 1], ends=False)
        written = save({name: tensor.contiguous() for name, tensor in ode.to_tensors(state).items()})
        resumed = ode.run(method, field, ode.from_tensors(load(written)), grid[stop:])
        assert torch.equal(resumed.x, whole), f"stopped after step {stop}"


@METHODS
def test_single_steps_and_a_finish_make_the_run(method):
    x, grid = noise((2, 3), torch.float32), schedule.sigmas(5)
    state = ode.start(method, x, grid[0])
    for t in grid[1:-1]:
        state = ode.step(method, field, state, t)
    state = ode.finish(method, field, state, grid[-1])
    assert torch.equal(state.x, ode.integrate(method, field, x, grid)) and state.t == 0


@METHODS
def test_interleaved_runs_and_runs_in_threads_equal_separate_ones(method):
    grid = schedule.sigmas(6)
    starts = [noise((2, 3), torch.float32, seed) for seed in (0, 1)]
    alone = [ode.integrate(method._replace(last=None), field, x, grid) for x in starts]
    states = [ode.start(method, x, grid[0]) for x in starts]
    for t in grid[1:]:
        states = [ode.step(method, field, state, t) for state in states]
    assert all(torch.equal(state.x, x) for state, x in zip(states, alone, strict=True))

    results = [None, None]

    def work(i):
        results[i] = ode.integrate(method._replace(last=None), field, starts[i], grid)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, x) for result, x in zip(results, alone, strict=True))


@METHODS
def test_a_grid_for_each_sample_gives_each_sample_its_own_run(method):
    x = noise((3, 2, 2))
    grids = [schedule.sigmas(6, shift=shift).double() for shift in (3.0, 1.0, 8.0)]
    batched = ode.integrate(method, field, x, torch.stack(grids, 1))
    for i, grid in enumerate(grids):
        torch.testing.assert_close(batched[i : i + 1], ode.integrate(method, field, x[i : i + 1], grid))


@pytest.mark.parametrize("method", [m for m in ode.METHODS.values() if m.last is None], ids=lambda m: m.name)
def test_a_shorter_grid_padded_with_its_last_time_is_the_shorter_run(method):
    x = noise((2, 3))
    long, short = schedule.sigmas(8).double(), schedule.sigmas(5).double()
    batched = ode.integrate(method, field, x, schedule.stack([long, short]))
    torch.testing.assert_close(batched[:1], ode.integrate(method, field, x[:1], long))
    torch.testing.assert_close(batched[1:], ode.integrate(method, field, x[1:], short))


@METHODS
def test_the_result_of_a_sample_does_not_depend_on_its_batch_and_no_input_is_changed(method):
    x, grid = noise((4, 3), torch.float32), schedule.sigmas(7)
    x_before, grid_before = x.clone(), grid.clone()
    batched = ode.integrate(method, field, x, grid)
    assert torch.equal(x, x_before) and torch.equal(grid, grid_before)
    for i in range(4):
        assert torch.equal(batched[i : i + 1], ode.integrate(method, field, x[i : i + 1], grid))


def test_times_in_a_list_are_as_exact_as_the_state():
    recorded = []
    ode.integrate(ode.EULER, lambda x, t: recorded.append(t.item()) or x, noise(), [0.9, 0.7, 0.1])
    assert recorded == [0.9, 0.7]


def test_unipc_starts_its_next_step_from_the_corrected_state():
    # On D = x - t v linear in lambda the corrector is exact, whatever the predictor missed.
    def log_snr(t):
        return torch.log((1 - t) / t)

    def velocity(x, t):
        return (x - log_snr(t)) / t

    def exact(x, t, t_next):
        # t_next times the integral of e^lambda lambda, which is the difference of e^lambda (lambda - 1).
        ends = [torch.exp(log_snr(s)) * (log_snr(s) - 1) for s in (t, t_next)]
        return t_next / t * x + t_next * (ends[1] - ends[0])

    grid = torch.tensor([0.9, 0.7, 0.45, 0.2], dtype=torch.float64)
    first, last = (
        ode.run(ode.UNIPC, velocity, ode.start(ode.UNIPC, noise(), grid[0]), part).carry["x"]
        for part in (grid[:3], grid)
    )
    torch.testing.assert_close(last, exact(first, *grid[1:3]))


def test_every_name_has_its_method_and_options_that_do_not_fit_it_are_errors():
    for name, method in ode.METHODS.items():
        assert ode.named(name) is method and ode.named(name, key=prng.key(0)) is method
    assert ode.named("dopri5", rtol=1e-3)._replace(rtol=1e-5) == ode.DOPRI5
    assert ode.named("euler_ancestral", key=prng.key(0)).name == "euler_ancestral"
    assert set(ode.NAMES) == {*ode.METHODS, *ode.ADAPTIVE, *ode.STOCHASTIC, *ode.MEAN}
    for options, message in (
        ({"name": "eulr"}, "method 'eulr' must be one of euler, midpoint"),
        ({"name": "euler", "rtol": 1e-3}, "rtol and atol are for the adaptive methods, bosh3, dopri5, tsit5; euler is"),
        ({"name": "heun_churn"}, "heun_churn draws noise at every step and needs a key"),
        ({"name": "heun_churn", "key": prng.key(0), "atol": 1.0}, "heun_churn is none"),
    ):
        with pytest.raises(ValueError, match=message):
            ode.named(**options)
    with pytest.raises(ValueError, match="order 4 of UniPC"):
        ode.unipc(4)


def test_the_state_is_float32_whatever_the_dtype_of_the_velocity():
    recorded = []

    def velocity(x, t):
        recorded.extend([x.dtype, t.dtype])
        return x.bfloat16()

    result = ode.integrate(ode.HEUN, velocity, noise(dtype=torch.bfloat16), schedule.sigmas(3).double())
    assert result.dtype == torch.float32 and set(recorded) == {torch.float32}


def test_save_chooses_what_is_returned():
    x, grid = noise(), schedule.sigmas(5)
    final = ode.integrate(ode.HEUN, field, x, grid)
    everything = ode.integrate(ode.HEUN, field, x, grid, save="all")
    assert everything.shape == (6, 3, 2) and torch.equal(everything[0], x) and torch.equal(everything[-1], final)
    assert torch.equal(ode.integrate(ode.HEUN, field, x, grid, save=[-1, 2, 2]), everything[[-1, 2, 2]])
    means = ode.integrate(ode.HEUN, field, x, grid, save=lambda info: info.x.mean())
    assert torch.equal(torch.stack(means), everything[1:].mean((1, 2)))


def test_callbacks_get_every_step_with_the_prediction_it_started_from():
    x, grid = noise(), schedule.sigmas(4)
    infos = []
    final = ode.integrate(ode.HEUN, field, x, grid, on_step=infos.append)
    states = ode.integrate(ode.HEUN, field, x, grid, save="all")
    assert [info.index for info in infos] == [0, 1, 2, 3] and all(info.steps == 4 for info in infos)
    for i, info in enumerate(infos):
        assert torch.equal(info.x, states[i + 1]) and info.t == grid[i + 1]
        t = grid[i].double()
        assert torch.equal(info.denoised, states[i] - t * field(states[i], t))
    assert torch.equal(final, states[-1])


@METHODS
def test_gradients_in_x_times_and_what_the_velocity_closes_over_agree_with_differences(method):
    grid = torch.tensor([0.95, 0.7, 0.45, 0.2, 0.1], dtype=torch.float64)

    def result(x, times, weight):
        return ode.integrate(method, lambda x, t: torch.tanh(weight * x) * (1 + t), x, times)

    inputs = [noise((2, 2)), grid, torch.tensor(0.8, dtype=torch.float64)]
    assert torch.autograd.gradcheck(result, [tensor.clone().requires_grad_() for tensor in inputs])


@METHODS
def test_gradients_stay_finite_when_the_grid_touches_zero(method):
    for times in (schedule.sigmas(4), schedule.sigmas(4).flip(0)):
        gradients = torch.func.grad(
            lambda x, t, method=method: ode.integrate(method, field, x, t).square().sum(), argnums=(0, 1)
        )(noise(dtype=torch.float32), times)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


@METHODS
def test_forward_and_reverse_derivatives_agree_and_vmap_equals_a_loop(method):
    x, tangent, grid = noise((2, 3)), noise((2, 3), seed=1), schedule.sigmas(5).double()

    def result(x):
        return ode.integrate(method, field, x, grid)

    value, forward = torch.func.jvp(result, (x,), (tangent,))
    _, pullback = torch.func.vjp(result, x)
    (reverse,) = pullback(tangent)
    torch.testing.assert_close((forward * tangent).sum(), (reverse * tangent).sum())
    many = torch.stack([x, tangent])
    torch.testing.assert_close(torch.func.vmap(result)(many), torch.stack([value, result(tangent)]))
    grids = torch.stack([grid, schedule.sigmas(5, shift=1.5).double()])
    both = torch.func.vmap(lambda times: ode.integrate(method, field, x, times))(grids)
    torch.testing.assert_close(both[1], ode.integrate(method, field, x, grids[1]))


@METHODS
def test_a_whole_run_compiles_to_one_graph_with_the_values_and_gradients_of_eager(method):
    weight, x = noise((4, 4), torch.float32), noise((4, 4), torch.float32, 1)
    # As many steps as it takes to fill the method's carry.
    grid = schedule.sigmas(4 if method is ode.AB4 else 3)

    def objective(weight, x, times):
        return ode.integrate(method, lambda x, t: torch.tanh(x @ weight) * (1 + t), x, times).square().sum()

    torch._dynamo.reset()
    gradient = torch.func.grad_and_value(objective, argnums=(0, 1, 2))
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight, x, grid), gradient(weight, x, grid))


def test_a_state_that_is_not_finite_is_named_with_its_step_and_time_and_the_last_good_one_kept():
    x, grid = noise(), schedule.sigmas(5)

    def velocity(x, t):
        return torch.where(t < 0.7, torch.nan, x)

    with pytest.raises(ode.NonFiniteError, match=r"step 4 of 5, from t = 0\.50\d+") as caught:
        ode.integrate(ode.EULER, velocity, x, grid, check=True)
    good = ode.integrate(ode.EULER, velocity, x, grid[:4])
    assert torch.equal(caught.value.state.x, good) and caught.value.index == 3
    assert torch.isnan(ode.integrate(ode.EULER, velocity, x, grid)).all()


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.0], r"times have shape \(1,\)"),
        (torch.zeros(3, 3, 3), r"times have shape \(3, 3, 3\)"),
        (torch.zeros(4, 2), r"\(4, 2\).*batch 3"),
        ([1.0, 0.4, 0.5, 0.0], "not monotone"),
        ([1.2, 0.5, 0.0], r"leave \[0, 1\] \(there is a 1.2\)"),
        ([1.0, 0.5, -0.1], r"there is a -0.1"),
        ([1.0, math.nan, 0.0], "there is a nan"),
    ],
)
def test_grids_that_are_none_are_refused_by_name(times, message):
    with pytest.raises(ValueError, match=message):
        ode.integrate(ode.EULER, field, noise(), times)


def test_indices_outside_the_grid_are_refused():
    with pytest.raises(ValueError, match="index 6"):
        ode.integrate(ode.EULER, field, noise(), schedule.sigmas(5), save=[6])
