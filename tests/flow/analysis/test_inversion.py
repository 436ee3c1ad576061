"""Data to noise and back: what each way of inverting leaves, and when it cannot be done."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch.func import grad, vmap

from functional_sd3 import pipeline, weights
from functional_sd3.core import prng
from functional_sd3.flow import ode, schedule
from functional_sd3.flow.analysis import inversion, likelihood
from functional_sd3.flow.ode import fixed_point, reversible, stochastic
from functional_sd3.flow.ode.fixed_point import InversionFailed
from functional_sd3.image import pixels
from functional_sd3.recipes import shapes
from functional_sd3.weights import shipped
from tests.flow.ode import flows

# torch itself scripts its forward-mode derivatives when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

ONE_STEP = [ode.EULER, ode.MIDPOINT, ode.HEUN, ode.RALSTON, ode.RK4]
METHODS = pytest.mark.parametrize("method", ONE_STEP, ids=lambda method: method.name)


def data(shape=(3, 2), dtype=torch.float64, seed=0):
    return prng.normal(prng.key(seed), shape, dtype)


@METHODS
def test_the_inverse_of_a_step_is_where_the_step_came_from(method):
    x, t, t_next = data(), torch.tensor(0.3).double(), torch.tensor(0.42).double()
    inverse = fixed_point.inverse(method, tolerance=1e-13)
    y = inverse.step(flows.field, x, t, t_next, []).x
    torch.testing.assert_close(method.step(flows.field, y, t_next, t, []).x, x, rtol=0, atol=1e-12)
    assert (y - x).norm() > 0.01


@METHODS
def test_the_method_leads_from_the_inverted_noise_to_the_data(method):
    x, grid = data(), schedule.sigmas(12).double()
    noise = likelihood.invert(flows.field, x, grid, method=method, tolerance=1e-12)
    torch.testing.assert_close(ode.integrate(method, flows.field, noise, grid), x, rtol=0, atol=1e-10)
    followed = ode.integrate(method, flows.field, x, grid.flip(0))
    assert (noise - followed).norm() > 1e-10


def test_inverting_eulers_method_is_backward_euler():
    x = data()
    noise = likelihood.invert(lambda x, t: -2 * x, x, [0.0, 0.1], tolerance=1e-14)
    torch.testing.assert_close(noise, x / 1.2)


@pytest.mark.parametrize("times", [None, torch.linspace(1, 0, 51), torch.linspace(0, 1, 51)])
def test_fifty_even_steps_either_way_are_the_default(times):
    trip = likelihood.round_trip(flows.field, data(), times)
    usual = likelihood.round_trip(flows.field, data(), torch.arange(51) / 50)
    torch.testing.assert_close(trip.noise, usual.noise, rtol=0, atol=1e-5)
    assert (trip.error < 1e-5).all()
    torch.testing.assert_close(trip.error, (trip.data - data()).norm(dim=1) / data().norm(dim=1))


def test_the_plain_way_loses_a_step_and_the_others_nothing():
    x = data(dtype=torch.float32)
    grid = schedule.sigmas(20)
    lost = {
        name: likelihood.round_trip(flows.field, x, grid, by=by).error.max().item()
        for name, by in (
            ("plain", likelihood.plain(ode.EULER)),
            ("finer", likelihood.plain(ode.RK4)),
            ("adaptive", likelihood.plain(ode.DOPRI5._replace(rtol=1e-6, atol=1e-6))),
            ("corrected", likelihood.corrected()),
            ("coupled", likelihood.coupled(ode.EULER)),
            ("coupled twice", likelihood.coupled()),
        )
    }
    assert lost["plain"] > 1e-2 and lost["finer"] < 1e-5 and lost["adaptive"] < 2e-5
    assert lost["corrected"] < 1e-5 and lost["coupled"] < 3e-6 and lost["coupled twice"] < 3e-6


def test_an_adaptive_method_is_followed_back():
    x = data(dtype=torch.float32)
    noise = likelihood.invert(flows.gaussian_field, x, [1.0, 0.0], method=ode.DOPRI5)
    torch.testing.assert_close(flows.gaussian_flow(noise, 0.0), x, rtol=1e-4, atol=1e-4)


def test_a_stiff_linear_step_is_solved_only_with_acceleration():
    # h |A| = 2.4: the plain iteration diverges, Anderson's finds the solution in as many steps as there are directions.
    matrix = torch.diag(torch.tensor([12.0, 8.0], dtype=torch.float64))
    field = lambda x, t: x @ matrix  # noqa: E731
    x, options = data(), {"iterations": 12, "tolerance": 1e-9}
    t, t_next = torch.tensor([0.0, 0.2], dtype=torch.float64)
    y = fixed_point.inverse(ode.EULER, **options).step(field, x, t, t_next, []).x
    torch.testing.assert_close(y @ (torch.eye(2).double() - 0.2 * matrix), x, rtol=0, atol=1e-8)
    with pytest.raises(
        InversionFailed, match=r"sample \d at t = 0.2: 12 iterations left .* above the tolerance 1e-09"
    ) as caught:
        fixed_point.inverse(ode.EULER, depth=0, **options).step(field, x, t, t_next, [])
    assert caught.value.residual > 1 and caught.value.t == pytest.approx(0.2)
    fixed_point.inverse(ode.EULER, depth=0, iterations=3, tolerance=None).step(field, x, t, t_next, [])


def test_a_sample_is_inverted_the_same_in_any_batch():
    # The third sample needs several times as many iterations as the first.
    x, scale = data((3, 2), torch.float32), torch.tensor([[0.1], [1.0], [6.0]])
    field = lambda x, t, scale=scale: torch.sin(scale * x)  # noqa: E731
    grid = schedule.sigmas(10)
    batched = likelihood.invert(field, x, grid)
    for i in range(3):
        alone = likelihood.invert(lambda x, t, i=i: field(x, t, scale[i : i + 1]), x[i : i + 1], grid)
        assert torch.equal(alone, batched[i : i + 1])


def test_the_iteration_stops_as_soon_as_all_samples_are_done():
    calls = []
    field = lambda x, t: calls.append(t) or 0.1 * x  # noqa: E731
    likelihood.invert(field, data(), [0.0, 0.5, 1.0], tolerance=1e-4)
    assert len(calls) < 12 and set(map(float, calls)) == {0.5, 1.0}


@METHODS
@pytest.mark.parametrize("coupling", [0.9, 1.0])
def test_the_inverse_undoes_a_coupled_run_whatever_the_method(method, coupling):
    there, back = reversible.reversible(method, coupling)
    x, grid = data(), schedule.sigmas(15).double().flip(0)
    start = ode.start(there, x, grid[0])
    end = ode.run(there, flows.field, start, grid)
    again = ode.run(back, flows.field, end, grid.flip(0))
    torch.testing.assert_close(again.x, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(again.carry["twin"], start.carry["twin"], rtol=0, atol=1e-12)
    assert (end.x - ode.integrate(method, flows.field, x, grid)).norm() < 0.5


@pytest.mark.parametrize("method", [ode.EULER, ode.HEUN, ode.RK4], ids=lambda method: method.name)
def test_a_coupled_method_has_the_order_of_its_base(method):
    coupled, _ = reversible.reversible(method)
    assert coupled.order == method.order and coupled.evaluations == 2 * method.evaluations
    velocity, solution = flows.FLOWS["rotation"]
    x, counts, errors = data(), [24, 48, 96], []
    for steps in counts:
        actual = ode.integrate(coupled, velocity, x, torch.linspace(1, 0, steps + 1, dtype=x.dtype))
        errors.append((actual - solution(x, 0.0)).norm().item())
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] > method.order - 0.2


def test_the_state_of_a_coupled_run_is_written_and_taken_up_again():
    there, back = reversible.reversible()
    x, grid = data(dtype=torch.float32), torch.linspace(0, 1, 9)
    end = ode.run(there, flows.field, ode.start(there, x, 0.0), grid)
    written = save({name: tensor.contiguous() for name, tensor in ode.to_tensors(end).items()})
    again = ode.run(back, flows.field, ode.from_tensors(load(written)), grid.flip(0))
    assert (again.x - x).norm() < 1e-5 * x.norm()
    # The noise alone is half of it.
    half = ode.integrate(back, flows.field, end.x, grid.flip(0))
    assert (half - x).norm() > 1e-4 * x.norm()


@pytest.mark.parametrize("way", ["corrected", "coupled"])
def test_a_grid_for_each_sample_and_steps_of_no_length(way):
    by = getattr(likelihood, way)(ode.HEUN)
    x = data((2, 3))
    long, short = schedule.sigmas(8).double(), schedule.sigmas(5).double()
    padded = torch.cat([short, short[-1:].expand(3)])
    batched = likelihood.round_trip(flows.field, x, torch.stack([long, padded], 1), by=by)
    alone = likelihood.round_trip(flows.field, x[1:], short, by=by)
    assert (batched.error < 1e-5).all()
    torch.testing.assert_close(batched.noise[1:], alone.noise, rtol=0, atol=1e-12 if way == "coupled" else 1e-5)


@pytest.mark.parametrize(
    "by",
    [likelihood.corrected(iterations=3, tolerance=None, depth=1), likelihood.coupled(ode.EULER)],
    ids=["corrected", "coupled"],
)
def test_inverting_under_grad_vmap_and_compile(by):
    grid = torch.tensor([0.0, 0.6])
    x, weight = data((4, 3), torch.float32), data((3, 3), torch.float32, 1) * 0.5

    def noise(x, weight):
        return likelihood.invert(lambda x, t: torch.tanh(x @ weight) * (1 + t), x, grid, method=by)

    plain = noise(x, weight)
    torch.testing.assert_close(vmap(lambda x: noise(x[None], weight)[0])(x), plain, rtol=1e-5, atol=1e-5)
    gradient = grad(lambda x, weight: noise(x, weight).square().sum(), argnums=(0, 1))
    actual, step = gradient(x, weight), 1e-2
    direction = data((3, 3), torch.float32, 2)
    ahead, behind = (noise(x, weight + s * direction).double().square().sum() for s in (step, -step))
    slope = (actual[1] * direction).sum().item()
    assert slope == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-2)
    torch._dynamo.reset()
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(x, weight), actual, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_under_vmap_all_iterations_are_made_and_samples_that_are_done_stay_as_they_are():
    x, grid, calls = data((4, 3), torch.float32), torch.linspace(0, 1, 9), []
    field = lambda x, t: calls.append(t) or torch.sin(x)  # noqa: E731
    plain = likelihood.invert(field, x, grid)
    eager = len(calls)
    mapped = vmap(lambda x: likelihood.invert(field, x[None], grid, iterations=20)[0])(x)
    assert len(calls) - eager == 8 * 20 > 2 * eager
    torch.testing.assert_close(mapped, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fixed_point.inverse(ode.DPMPP_2M), "dpmpp_2m carries earlier steps"),
        (lambda: fixed_point.inverse(ode.AB3), "adams_bashforth_3 carries"),
        (lambda: fixed_point.inverse(ode.HEUN_EDM), "ends with a step of euler"),
        (lambda: fixed_point.inverse(stochastic.ancestral(prng.key(0))), "carries a state of its own"),
        (lambda: reversible.reversible(reversible.reversible()[0]), "carries a state of its own"),
        (lambda: fixed_point.inverse(ode.EULER, iterations=0), "iterations 0 must be at least 1"),
        (lambda: reversible.reversible(coupling=0.0), "coupling 0.0 must be above 0"),
        (lambda: reversible.reversible(coupling=1.5), "coupling 1.5"),
        (lambda: likelihood.invert(flows.field, data(), [0.0, 2.0]), r"leave \[0, 1\]"),
    ],
)
def test_what_cannot_be_inverted_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_velocity_that_is_not_finite_is_an_error_of_the_run():
    field = lambda x, t: torch.where(t > 0.5, math.nan, x)  # noqa: E731
    with pytest.raises(ode.NonFiniteError, match="step 3 of 4"):
        likelihood.invert(field, data(), torch.linspace(0, 1, 5), check=True)


@pytest.mark.parametrize("way", [likelihood.corrected(), likelihood.coupled(ode.EULER)], ids=["corrected", "coupled"])
def test_an_image_of_the_shipped_model_survives_the_round_trip_of_fifty_steps(way):
    model = weights.load(shipped.folder(), dtype=torch.float32)
    scene = shapes.Scene((shapes.Thing("large", "red", "circle", 24.0, 40.0),), "white")
    with torch.no_grad():
        x0 = pipeline.encode_images(model.params, model.config, pixels.from_pil(shapes.draw(scene)))
        conditions = pipeline.encode(model.params, model.config, model.tokenizers, [shapes.caption(scene)])
        field = pipeline.velocity(model.params, model.config, conditions, 1.0)
        trip = inversion.round_trip(field, x0, by=way)
    assert trip.error.item() < 1e-4
    # Rewards for its own images made the flow expand towards noise, as guidance does.
    assert 0.7 < trip.noise.std() < 2.0
