"""Adaptive integrators: their tableaus, tolerances, dense output, explicit state, transforms, and clear failures."""

import math
import threading

import numpy as np
import pytest
import scipy.integrate
import torch
from safetensors.torch import load, save

from functional_sd3.flow import ode, schedule
from functional_sd3.flow.ode import adaptive, dense, step_size
from functional_sd3.flow.path import broadcast
from tests.flow.ode.flows import FLOWS, field, noise

# torch builds its own forward-mode rules with torch.jit.script on the first jvp.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
METHODS = pytest.mark.parametrize("method", ode.ADAPTIVE.values(), ids=ode.ADAPTIVE)
BOTH_ORDERS = {"bosh3": (3, 2), "dopri5": (5, 4), "tsit5": (5, 4)}
ENDS = [1.0, 0.0]


def restless(x, t):
    """A field that needs steps of many lengths."""
    t = broadcast(t, x)
    return torch.tanh(3 * x) * (1 + t) - 2 * x.roll(1, -1) * torch.cos(8 * t) + torch.exp(-200 * (t - 0.4) ** 2)


def converged(x, times=(1.0, 0.0)):
    solution = scipy.integrate.solve_ivp(
        lambda t, y: restless(torch.tensor(y).reshape(x.shape), torch.tensor(t, dtype=torch.float64)).flatten().numpy(),
        (times[0], times[-1]),
        x.flatten().numpy(),
        "DOP853",
        times,
        rtol=1e-12,
        atol=1e-13,
    )
    return torch.tensor(solution.y.T).reshape(len(times), *x.shape)


def residuals(matrix, weights, nodes, theta=1.0):
    """By order, how far weights are from integrating every rooted tree with that many nodes up to theta: Hairer et al.,
    table II.2.1."""
    c, mc = nodes, matrix @ nodes
    trees = {
        1: [(np.ones_like(c), 1)],
        2: [(c, 2)],
        3: [(c**2, 3), (mc, 6)],
        4: [(c**3, 4), (c * mc, 8), (matrix @ c**2, 12), (matrix @ mc, 24)],
        5: [
            (c**4, 5),
            (c**2 * mc, 10),
            (mc**2, 20),
            (c * (matrix @ c**2), 15),
            (matrix @ c**3, 20),
            (c * (matrix @ mc), 30),
            (matrix @ (c * mc), 40),
            (matrix @ (matrix @ c**2), 60),
            (matrix @ (matrix @ mc), 120),
        ],
    }
    return {order: max(abs(weights @ v - theta**order / d) for v, d in pairs) for order, pairs in trees.items()}


def highest_order(actual):
    return max((order for order in actual if all(actual[low] < 1e-13 for low in range(1, order + 1))), default=0)


@METHODS
def test_both_solutions_of_a_pair_and_its_dense_output_satisfy_the_conditions_of_their_orders(method):
    tableau, stages = method.tableau, len(method.tableau.nodes)
    matrix = np.array([[*row, *[0.0] * (stages - len(row))] for row in tableau.matrix])
    nodes, weights = np.array(tableau.nodes), np.array(tableau.weights)
    np.testing.assert_allclose(matrix.sum(1), nodes, atol=1e-14)
    np.testing.assert_array_equal(matrix[-1], weights)
    order, embedded = BOTH_ORDERS[method.name]
    assert highest_order(residuals(matrix, weights, nodes)) == order == method.order
    assert highest_order(residuals(matrix, weights - np.array(method.errors), nodes)) == embedded == method.estimate - 1
    polynomials = np.array(method.interpolant)
    for theta in (0.25, 0.6, 0.9):
        at = polynomials @ theta ** np.arange(1, polynomials.shape[1] + 1)
        assert highest_order(residuals(matrix, at, nodes, theta)) == min(order, 4)
    np.testing.assert_allclose(polynomials.sum(1), weights, atol=1e-14)


@METHODS
@pytest.mark.parametrize("flow", FLOWS)
def test_the_error_is_of_the_size_of_the_tolerance_and_falls_with_it(method, flow):
    velocity, solution = FLOWS[flow]
    x, tolerances = noise(), [1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8]
    errors = []
    for tolerance in tolerances:
        end = ode.integrate(method._replace(max_steps=9999), velocity, x, ENDS, rtol=tolerance, atol=tolerance)
        errors.append((end - solution(x, torch.tensor(0.0))).abs().max().item())
    assert all(error < 20 * tolerance for error, tolerance in zip(errors, tolerances, strict=True)), errors
    slope = np.polyfit(np.log(tolerances), np.log(errors), 1)[0]
    assert 0.6 < slope < 1.4, errors


@pytest.mark.parametrize(("method", "theirs"), [(ode.BOSH3, "RK23"), (ode.DOPRI5, "RK45")], ids=lambda v: str(v)[:12])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_scipy_meets_the_same_tolerance_with_about_as_many_evaluations(method, theirs, tolerance):
    x = noise((1, 6))
    solution = adaptive.solve(method, restless, x, ENDS, rtol=tolerance, atol=tolerance)

    def flat(t, y):
        return restless(torch.tensor(y)[None], torch.tensor([t], dtype=torch.float64))[0].numpy()

    other = scipy.integrate.solve_ivp(flat, (1, 0), x[0].numpy(), theirs, rtol=tolerance, atol=tolerance)
    assert abs(solution.x[-1][0].numpy() - other.y[:, -1]).max() < 20 * tolerance
    assert abs(solution.evaluations.item() / other.nfev - 1) < 0.25


@METHODS
def test_no_step_is_accepted_whose_estimated_error_is_beyond_the_tolerance_and_none_rejected_within(method):
    run, rejected = adaptive.start(method, restless, 9 * noise((3, 4)), ENDS, h=0.5), 0
    while not adaptive.finished(method, run):
        before, run = run, adaptive.step(method, restless, run)
        moved = run.accepted > before.accepted
        assert (run.attempt_error[moved] <= 1).all() and torch.equal(moved, run.t != before.t)
        refused = run.rejected > before.rejected
        assert (run.attempt_error[refused] > 1).all() and (run.h[refused] < before.h[refused]).all()
        rejected += int(refused.sum())
    assert rejected > 0


@pytest.mark.parametrize(("method", "theirs"), [(ode.BOSH3, "RK23"), (ode.DOPRI5, "RK45")], ids=lambda v: str(v)[:12])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_the_first_step_is_as_long_as_scipys(method, theirs, size):
    x = size * noise((1, 6))
    solver = getattr(scipy.integrate, theirs)(
        lambda t, y: restless(torch.tensor(y)[None], torch.tensor([t], dtype=torch.float64))[0].numpy(),
        1.0,
        x[0].numpy(),
        0.0,
        rtol=1e-5,
        atol=1e-6,
    )
    assert adaptive.start(method, restless, x, ENDS).h.item() == pytest.approx(solver.h_abs, rel=1e-9)


def test_a_step_that_the_end_cuts_short_does_not_shorten_the_one_that_was_meant():
    solution = adaptive.solve(ode.DOPRI5, restless, noise(), [1.0, 1 - 1e-6], h=0.03)
    assert (solution.h >= 0.03).all() and solution.accepted.tolist() == [1, 1, 1]


@pytest.mark.parametrize(("method", "theirs"), [(ode.BOSH3, "RK23"), (ode.DOPRI5, "RK45")], ids=lambda v: str(v)[:12])
def test_one_step_of_a_pair_its_error_and_its_dense_output_are_scipys(method, theirs):
    x, h = noise((1, 6)), 0.13
    solver = getattr(scipy.integrate, theirs)(
        lambda t, y: restless(torch.tensor(y)[None], torch.tensor([t], dtype=torch.float64))[0].numpy(),
        0.9,
        x[0].numpy(),
        0.9 - h,
        first_step=h,
        rtol=10,
        atol=10,
    )
    solver.step()
    ours = adaptive.solve(method, restless, x, [0.9, 0.9 - h], rtol=10.0, atol=10.0, h=h, keep=True)
    assert ours.accepted.item() == 1 and solver.t == 0.9 - h
    np.testing.assert_allclose(ours.x[-1][0].numpy(), solver.y, rtol=1e-13)
    for t in (0.88, 0.82, 0.78):
        np.testing.assert_allclose(dense.evaluate(ours.dense, t)[0].numpy(), solver.dense_output()(t), rtol=1e-12)


@METHODS
def test_the_times_between_change_neither_the_end_nor_what_it_took(method):
    x = noise((3, 4))
    bare = adaptive.solve(method, restless, x, ENDS)
    dense_output = adaptive.solve(method, restless, x, torch.linspace(1, 0, 12))
    assert torch.equal(dense_output.x[-1], bare.x[-1]) and torch.equal(dense_output.x[0], x)
    assert torch.equal(dense_output.evaluations, bare.evaluations) and torch.equal(dense_output.accepted, bare.accepted)


@METHODS
def test_dense_output_meets_the_tolerance_too_and_is_the_same_by_either_function(method):
    x, times, tolerance = noise((2, 4)), [1.0, 0.93, 0.55, 0.41, 0.39, 0.02, 0.0], 1e-6
    solution = adaptive.solve(method, restless, x, times, rtol=tolerance, atol=tolerance, keep=True)
    assert (solution.x - converged(x, times)).abs().max() < 100 * tolerance
    for i, t in enumerate(times):
        torch.testing.assert_close(dense.evaluate(solution.dense, t), solution.x[i], rtol=1e-12, atol=1e-12)
    assert torch.isnan(dense.evaluate(solution.dense, 1.01)).all()


@METHODS
def test_the_error_of_dense_output_falls_one_power_above_its_order_within_one_step(method):
    velocity, solution = FLOWS["rotation"]
    x, errors, lengths = noise(), [], [0.2, 0.1, 0.05]
    for h in lengths:
        ends = [1.0, 1 - h]
        (step,) = adaptive.solve(method, velocity, x, ends, rtol=1e3, atol=1e3, h=h, keep=True).dense
        inner = 1 - torch.linspace(0.1, 0.9, 9, dtype=torch.float64) * h
        errors.append(max((dense.value(step, t.expand(3)) - solution(x, t)).abs().max().item() for t in inner))
    power = np.polyfit(np.log(lengths), np.log(errors), 1)[0]
    assert -0.3 < power - (min(method.order, 4) + 1) < 0.7


@METHODS
def test_polynomials_in_time_up_to_the_order_are_exact_whatever_the_tolerance(method):
    degree = method.order - 1

    def velocity(x, t):
        return (degree + 1) * broadcast(t, x) ** degree * torch.ones_like(x)

    x = noise()
    end = ode.integrate(method, velocity, x, ENDS, rtol=1e-1, atol=1e-1)
    torch.testing.assert_close(end, x - 1, rtol=0, atol=1e-13)


@METHODS
def test_a_sample_has_the_same_result_and_takes_the_same_steps_in_any_batch(method):
    # Samples of different difficulty, so that each has steps of its own and some wait for the others.
    x = noise((4, 6)) * torch.tensor([0.01, 1.0, 5.0, 30.0]).double()[:, None]
    times = torch.linspace(1, 0, 5)
    batched = adaptive.solve(method, restless, x, times)
    assert len(set(batched.evaluations.tolist())) > 1
    for i in range(4):
        alone = adaptive.solve(method, restless, x[i : i + 1], times)
        assert torch.equal(alone.x[:, 0], batched.x[:, i])
        for name in ("evaluations", "accepted", "rejected"):
            assert torch.equal(getattr(alone, name)[0], getattr(batched, name)[i])


@METHODS
def test_the_counts_of_one_sample_are_the_calls_of_the_velocity(method):
    calls = []
    solution = adaptive.solve(method, lambda x, t: calls.append(t) or restless(x, t), 9 * noise((1, 6)), ENDS)
    stages = len(method.tableau.nodes)
    assert solution.evaluations.item() == len(calls)
    assert len(calls) == 2 + (stages - 1) * (solution.accepted.item() + solution.rejected.item())
    assert all(0 <= t <= 1 for t in torch.cat(calls).tolist())


def test_hard_places_are_met_with_rejected_steps_and_short_ones():
    def switch(x, t):
        return torch.tanh(100 * (broadcast(t, x) - 0.3)) * torch.ones_like(x)

    solution = adaptive.solve(ode.DOPRI5, switch, noise((1, 2)), [0.9, 0.1], keep=True)
    assert solution.rejected.item() > 0
    lengths = torch.tensor([(step.t_next - step.t).abs().item() for step in solution.dense])
    assert lengths.max() > 10 * lengths[lengths > 0].min()
    # The integral of tanh is log cosh, here 60 - log 2 and 20 - log 2 over 100.
    torch.testing.assert_close(solution.x[-1], noise((1, 2)) - 0.4, rtol=0, atol=1e-4)


@METHODS
def test_a_run_stopped_written_and_taken_up_again_is_the_whole_run_to_the_bit(method):
    x, times = noise((2, 3, 4), torch.float32), torch.linspace(1, 0, 4)
    whole = adaptive.solve(method, restless, x, times, rtol=1e-3, atol=1e-3)
    run = adaptive.start(method._replace(rtol=1e-3, atol=1e-3), restless, x, times)
    steps = 0
    while not adaptive.finished(method, run):
        run = adaptive.step(method._replace(rtol=1e-3, atol=1e-3), restless, run)
        tensors = {name: tensor.contiguous() for name, tensor in adaptive.to_tensors(run).items()}
        run, steps = adaptive.from_tensors(load(save(tensors))), steps + 1
    solution = adaptive.finish(run)
    assert steps > 3 and torch.equal(solution.x, whole.x) and torch.equal(solution.evaluations, whole.evaluations)


@METHODS
def test_interleaved_runs_and_runs_in_threads_equal_separate_ones(method):
    starts = [noise((2, 3), seed=seed) for seed in (0, 1)]
    alone = [adaptive.solve(method, restless, x, ENDS).x for x in starts]
    runs = [adaptive.start(method, restless, x, ENDS) for x in starts]
    while any((run.t != 0).any() for run in runs):
        runs = [adaptive.step(method, restless, run) for run in runs]
    assert all(torch.equal(adaptive.finish(run).x, x) for run, x in zip(runs, alone, strict=True))

    results = [None, None]

    def work(i):
        results[i] = adaptive.solve(method, restless, starts[i], ENDS).x

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, x) for result, x in zip(results, alone, strict=True))


@METHODS
def test_forth_and_back_returns_to_the_start_within_the_tolerance(method):
    x = noise((3, 4))
    options = {"rtol": 1e-7, "atol": 1e-7}
    there = ode.integrate(method, restless, x, ENDS, **options)
    torch.testing.assert_close(ode.integrate(method, restless, there, [0.0, 1.0], **options), x, rtol=0, atol=1e-5)


def test_samples_may_start_and_end_at_times_of_their_own_and_one_that_has_nothing_to_do_stays():
    x = noise((3, 4))
    times = torch.tensor([[1.0, 0.8, 0.5], [0.6, 0.4, 0.5], [0.2, 0.0, 0.5]])
    solution = adaptive.solve(ode.DOPRI5, restless, x, times)
    for i in range(2):
        alone = adaptive.solve(ode.DOPRI5, restless, x[i : i + 1], times[:, i])
        assert torch.equal(alone.x[:, 0], solution.x[:, i])
    assert torch.equal(solution.x[:, 2], x[2].expand(3, -1)) and solution.accepted[2] == 0


def test_each_sample_may_have_a_tolerance_of_its_own():
    x = noise((1, 6)).expand(2, -1)
    tolerances = torch.tensor([1e-3, 1e-8], dtype=torch.float64)
    solution = adaptive.solve(ode.DOPRI5, restless, x, ENDS, rtol=tolerances, atol=tolerances)
    errors = (solution.x[-1] - converged(x)[-1]).abs().amax(1)
    assert errors[1] < 1e-6 < errors[0] and solution.evaluations[1] > 3 * solution.evaluations[0]


@METHODS
def test_gradients_in_x_times_and_what_the_velocity_closes_over_are_those_of_the_flow(method):
    # Against differences of a converged solution: the derivative of the steps approaches that of the flow.
    tight = {"rtol": 1e-7, "atol": 1e-7}
    x, times, weight = noise((2, 2)), torch.tensor([0.9, 0.15], dtype=torch.float64), torch.tensor(0.8).double()
    method = method._replace(max_steps=9999)

    def result(x, times, weight):
        velocity = lambda x, t: torch.tanh(weight * x) * broadcast(1 + t, x)  # noqa: E731
        return ode.integrate(method, velocity, x, times, **tight).square().sum()

    actual = torch.func.grad(result, argnums=(0, 1, 2))(x, times, weight)
    for argument, gradient in enumerate(actual):
        inputs = [x, times, weight]
        for place in np.ndindex(*inputs[argument].shape):
            moved = []
            for sign in (1, -1):
                changed = [tensor.clone() for tensor in inputs]
                changed[argument][place] += sign * 1e-3
                moved.append(result(*changed))
            assert gradient[place].item() == pytest.approx((moved[0] - moved[1]).item() / 2e-3, rel=1e-3, abs=1e-5)


@METHODS
def test_forward_and_reverse_derivatives_agree_where_steps_are_rejected_and_outputs_lie_between(method):
    x, tangent, times = 5 * noise((2, 3)), noise((2, 3), seed=1), torch.linspace(1, 0, 4, dtype=torch.float64)

    def result(x):
        return ode.integrate(method, restless, x, times, save="all", rtol=1e-3, atol=1e-3)

    value, forward = torch.func.jvp(result, (x,), (tangent,))
    _, pullback = torch.func.vjp(result, x)
    cotangent = noise(value.shape, seed=2)
    (reverse,) = pullback(cotangent)
    torch.testing.assert_close((forward * cotangent).sum(), (reverse * tangent).sum())
    assert torch.equal(value, result(x))


def test_one_attempt_compiles_to_one_graph_and_vmaps_though_the_loop_cannot():
    x = noise((2, 3))
    run = adaptive.start(ode.DOPRI5, restless, x, [1.0, 0.5, 0.0], h=0.3)
    torch._dynamo.reset()
    compiled = torch.compile(lambda run: adaptive.step(ode.DOPRI5, restless, run), fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(compiled(run), adaptive.step(ode.DOPRI5, restless, run), strict=True):
        torch.testing.assert_close(mine, theirs)
    many = torch.func.vmap(lambda h: adaptive.step(ode.DOPRI5, restless, run._replace(h=h)).x)(run.h.expand(2, 2))
    assert torch.equal(many[1], adaptive.step(ode.DOPRI5, restless, run).x)
    with pytest.raises(ValueError, match="cannot run under vmap.*in one batch"):
        torch.func.vmap(lambda x: ode.integrate(ode.DOPRI5, restless, x, ENDS))(x[None])


def test_what_integrate_saves_and_tells_is_the_solution_at_the_times():
    x, times = noise((3, 2)), schedule.sigmas(6)
    solution = adaptive.solve(ode.TSIT5, restless, x, times)
    assert torch.equal(ode.integrate(ode.TSIT5, restless, x, times), solution.x[-1])
    assert torch.equal(ode.integrate(ode.TSIT5, restless, x, times, save="all"), solution.x)
    assert torch.equal(ode.integrate(ode.TSIT5, restless, x, times, save=[2, -1]), solution.x[[2, -1]])
    infos = []
    means = ode.integrate(ode.TSIT5, restless, x, times, save=lambda info: info.x.mean(), on_step=infos.append)
    assert torch.equal(torch.stack(means), solution.x[1:].mean((1, 2)))
    assert [info.index for info in infos] == list(range(6)) and all(info.steps == 6 for info in infos)
    for i, info in enumerate(infos):
        assert torch.equal(info.x, solution.x[i + 1]) and torch.equal(info.t, times[i + 1].double().expand(3))
    # The last two times and the straight line through them, which ends at the last state itself.
    torch.testing.assert_close(infos[-1].denoised, solution.x[-1])
    slope = (solution.x[2] - solution.x[1]) / (times[2] - times[1]).double()
    torch.testing.assert_close(infos[1].denoised, solution.x[2] - times[2].double() * slope)


def test_parts_of_a_run_give_the_whole_within_the_tolerance_and_take_their_step_length_along():
    x, options = noise((3, 4)), {"rtol": 1e-6, "atol": 1e-6}
    method = ode.DOPRI5._replace(**options)
    state = ode.run(method, restless, ode.start(method, x, 1.0), [1.0, 0.7, 0.5], ends=False)
    assert torch.equal(state.t, torch.tensor(0.5).double())
    calls = []
    state = ode.from_tensors(ode.to_tensors(state))
    state = ode.finish(method, lambda x, t: calls.append(t) or restless(x, t), state, 0.0)
    assert (len(calls) - 1) % 6 == 0, "a length was chosen anew"
    torch.testing.assert_close(state.x, ode.integrate(method, restless, x, ENDS), rtol=0, atol=2e-5)


def test_the_state_is_float32_whatever_the_dtype_of_the_velocity():
    recorded = []

    def velocity(x, t):
        recorded.extend([x.dtype, t.dtype])
        return x.bfloat16()

    result = ode.integrate(ode.BOSH3, velocity, noise(dtype=torch.bfloat16), ENDS, rtol=1e-2, atol=1e-2)
    assert result.dtype == torch.float32 and set(recorded) == {torch.float32}


def test_a_velocity_that_is_not_finite_is_named_with_its_sample_and_time_and_the_last_good_state_kept():
    x = noise((3, 2))
    bad = torch.tensor([False, True, False])[:, None]

    def velocity(x, t):
        return torch.where(bad & (broadcast(t, x) < 0.5), torch.nan, x)

    with pytest.raises(
        adaptive.StepFailed, match=r"sample 1 stopped at t = 0\.5\d* on its way to 0 .* not finite"
    ) as caught:
        ode.integrate(ode.DOPRI5, velocity, x, ENDS)
    failure = caught.value
    assert failure.sample == 1 and failure.t == pytest.approx(0.5, abs=1e-12) and 0 < failure.h < 1e-14
    torch.testing.assert_close(failure.state.x[1], x[1] * math.exp(-0.5), rtol=1e-4, atol=0)
    assert torch.isfinite(failure.state.x).all()
    message = "sample 0 stopped at t = 1 on its way to 0 after 0 steps.*not finite"
    with pytest.raises(adaptive.StepFailed, match=message):
        ode.integrate(ode.DOPRI5, lambda x, t: torch.inf * x, x, ENDS)


def test_a_step_that_underflows_says_that_the_tolerance_is_out_of_reach():
    # x = 1 / (1 - 3 (1 - t)) leaves every bound at t = 2/3.
    with pytest.raises(adaptive.StepFailed, match=r"sample 0 stopped at t = 0\.6666\d*.*even a step of h = .* rtol"):
        ode.integrate(ode.DOPRI5, lambda x, t: -3 * x**2, torch.ones(1, 1).double(), ENDS)


def test_too_many_attempts_are_a_failure_with_the_number_and_the_step_that_was_next():
    with pytest.raises(
        adaptive.StepFailed, match=r"max_steps = 7 attempts did not suffice at rtol = 1e-09.*h = "
    ) as caught:
        adaptive.solve(ode.BOSH3, restless, noise(), ENDS, rtol=1e-9, atol=1e-9, max_steps=7)
    run = caught.value.run
    assert 0 < caught.value.t < 1 and (run.accepted + run.rejected)[caught.value.sample] == 7
    # What is left of the run goes on with more attempts.
    method = ode.BOSH3._replace(rtol=1e-9, atol=1e-9, max_steps=99999)
    while not adaptive.finished(method, run):
        run = adaptive.step(method, restless, run)
    whole = adaptive.solve(method, restless, noise(), ENDS)
    assert torch.equal(adaptive.finish(run).x, whole.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": 1e-8}, "rtol 1e-08 cannot be met in float32; it must be at least 4.8e-07"),
        ({"rtol": -1e-3}, "rtol -0.001 must be a number of at least 0"),
        ({"atol": math.nan}, "atol nan must be"),
        ({"rtol": 0.0, "atol": 0.0}, "both 0"),
        ({"rtol": torch.ones(2)}, r"rtol has shape \(2,\); it is a number or \(batch,\), \(3,\)"),
        ({"times": [1.0, 0.4, 0.5, 0.0]}, "not monotone"),
        ({"times": [1.2, 0.0]}, "leave"),
        ({"times": [1.0]}, r"times have shape \(1,\)"),
        ({"x": torch.tensor(1.0)}, "x is a scalar"),
        ({"max_steps": 0}, "max_steps 0"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(options, message):
    options = {"x": noise(dtype=torch.float32), "times": ENDS, **options}
    with pytest.raises(ValueError, match=message):
        adaptive.solve(ode.DOPRI5, field, **options)


def test_tolerances_of_a_method_of_fixed_steps_and_counts_of_an_adaptive_one_are_refused():
    with pytest.raises(ValueError, match="euler takes the steps of the times"):
        ode.integrate(ode.EULER, field, noise(), ENDS, rtol=1e-3)
    with pytest.raises(ValueError, match="dopri5 has no fixed number of evaluations"):
        ode.evaluations(ode.DOPRI5, 5)


def test_the_length_of_the_next_step_follows_the_controllers_formula():
    method, error = ode.DOPRI5, torch.tensor([0.5, 0.5, 1e-9, 2.0, 1e9, math.nan, 0.01])
    last = torch.tensor([0.5, 0.1, 0.5, 0.5, 0.5, 0.5, 0.5])
    retrying = torch.tensor([False, False, False, False, False, False, True])
    actual = step_size.factor(method, error, last, retrying)
    expected = [
        0.9 * 0.5**-0.17 * 0.5**0.04,
        0.9 * 0.5**-0.17 * 0.1**0.04,
        10.0,
        0.9 * 2**-0.2,
        0.2,
        0.2,
        1.0,
    ]
    torch.testing.assert_close(actual, torch.tensor(expected))
