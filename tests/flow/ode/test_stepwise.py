"""Velocities of each step: a run takes them by the step's index, for every method, whole and in parts."""

import pytest
import torch

from functional_sd3.core import prng
from functional_sd3.flow import ode, schedule
from functional_sd3.flow.analysis import adjoint
from functional_sd3.flow.ode import fixed_point, reversible
from tests.flow.ode.flows import field, noise

KEY = prng.key(5)
METHODS = {
    **ode.METHODS,
    **{name: make(KEY) for name, make in ode.STOCHASTIC.items()},
    "unipc_3": ode.unipc(3),
    "rk4_churn": ode.churn(KEY, base=ode.RK4),
    "checkpointed": adjoint.checkpointed(ode.HEUN_EDM),
    "reversible": reversible.reversible(ode.MIDPOINT)[0],
    "inverse": fixed_point.inverse(ode.HEUN, iterations=4, tolerance=None),
    "inverse_to_tolerance": fixed_point.inverse(ode.EULER, tolerance=1e-3),
}
ALL = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
STEPS = 5


def by_step(step, x, t):
    return (1 + 0.1 * step) * field(x, t)


VELOCITIES = ode.Stepwise(lambda step: lambda x, t: by_step(step, x, t))


def grids():
    """One grid for all samples, and one for each."""
    grid = schedule.sigmas(STEPS).double()
    return {"one": grid, "each": torch.stack([grid, grid**2, torch.linspace(1, 0.2, STEPS + 1).double()], 1)}


@ALL
@pytest.mark.parametrize("kind", ["one", "each"])
def test_the_times_of_each_step_are_those_at_which_a_run_evaluates(method, kind):
    grid, evaluated = grids()[kind], [[] for _ in range(STEPS)]

    def recorder(step):
        return lambda x, t: evaluated[step].append(t) or field(x, t)

    ode.integrate(method, ode.Stepwise(recorder), noise(), grid)
    known = ode.evaluation_times(method, grid, 3)
    assert len(known) == STEPS
    for step in range(STEPS):
        # The iterations of an inverse repeat the times of one.
        repeats = len(evaluated[step]) // len(known[step])
        assert repeats == 1 or "inverse" in method.name
        assert torch.equal(torch.stack(evaluated[step]), known[step].repeat(repeats, *[1] * (grid.ndim - 1)))


@ALL
def test_step_i_evaluates_velocity_i_and_no_other(method):
    x, grid = noise(), grids()["one"]
    state = ode.start(method, x, grid[0])
    for step in range(STEPS):
        advance = ode.finish if step == STEPS - 1 else ode.step
        state = advance(method, VELOCITIES.at(step), state, grid[step + 1])
    assert torch.equal(ode.integrate(method, VELOCITIES, x, grid), state.x)
    assert not torch.equal(ode.integrate(method, field, x, grid), state.x)


@ALL
def test_a_run_resumes_with_the_velocities_of_the_steps_that_are_left(method):
    x, grid = noise(), grids()["one"]
    state = ode.run(method, VELOCITIES, ode.start(method, x, grid[0]), grid[:3], ends=False)
    resumed = ode.run(method, VELOCITIES.after(2), state, grid[2:])
    assert torch.equal(resumed.x, ode.integrate(method, VELOCITIES, x, grid))


def test_a_run_of_them_compiles_vmaps_and_has_gradients():
    grid, x = grids()["one"], noise()

    def pairing(scale, x):
        velocities = ode.Stepwise(lambda step: lambda x, t: scale[step] * field(x, t))
        return (ode.integrate(ode.HEUN_EDM, velocities, x, grid) * x).sum()

    scale = torch.linspace(0.5, 1.5, STEPS).double()
    gradient = torch.func.grad(pairing)
    expected = gradient(scale, x)
    assert (expected.abs() > 1e-6).all()
    compiled = torch.compile(gradient, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(scale, x), expected)
    many = torch.func.vmap(gradient, (0, None))(torch.stack([scale, 2 * scale]), x)
    torch.testing.assert_close(many, torch.stack([expected, gradient(2 * scale, x)]))


def test_an_adaptive_method_starts_anew_where_the_velocity_changes():
    grid, x, infos = grids()["one"], noise(), []
    velocities = [field] * 2 + [lambda x, t: -field(x, t)] * 3
    actual = ode.integrate(ode.BOSH3, ode.Stepwise(velocities.__getitem__), x, grid, on_step=infos.append)
    state = ode.start(ode.BOSH3, x, grid[0])
    for first, stop in ((0, 2), (2, 5)):
        state = ode.run(ode.BOSH3, velocities[first], state, grid[[first, stop]])
    torch.testing.assert_close(actual, state.x, rtol=1e-12, atol=1e-12)
    assert [(info.index, info.steps) for info in infos] == [(step, STEPS) for step in range(STEPS)]
    assert torch.equal(torch.stack([info.t[0] for info in infos]), grid[1:])
    same = ode.integrate(ode.BOSH3, ode.Stepwise(lambda step: field), x, grid)
    assert torch.equal(same, ode.integrate(ode.BOSH3, field, x, grid))


def test_an_adaptive_method_has_no_times_beforehand():
    with pytest.raises(ValueError, match="dopri5 has no fixed number of evaluations"):
        ode.evaluation_times(ode.DOPRI5, grids()["one"])


def test_functions_of_velocities_are_taken_step_by_step_where_one_is():
    total = ode.map_steps(lambda *values: sum(values), 1, ode.Stepwise(lambda step: 10 * step), 2)
    assert [total.at(step) for step in range(3)] == [3, 13, 23]
    assert ode.map_steps(lambda *values: sum(values), 1, 2) == 3
    assert ode.at_step(total.after(2), 1) == 33 and ode.at_step(7, 1) == 7
