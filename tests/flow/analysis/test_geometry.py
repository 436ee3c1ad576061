"""Lines of flows that are known in closed form: circles, exponentials, straight ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from functional_sd3 import pipeline
from functional_sd3.core import prng
from functional_sd3.flow import ode, path
from functional_sd3.flow.analysis import geometry
from tests import models

# torch builds its own forward-mode rules with torch.jit.script on the first jvp.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
HALF = torch.tensor(0.5, dtype=torch.float64)
TURN = torch.tensor([[0.0, -2.0], [2.0, 0.0]], dtype=torch.float64)


def normal(shape, seed=0):
    return prng.normal(prng.key(seed), shape, torch.float64)


def rotation(x, t):
    """Circles around 0 at two radians a unit of time."""
    return x @ TURN.T


def curved(x, t):
    return torch.tanh(x) * (1 + path.broadcast(t, x)) - 0.3 * x.roll(1, -1)


def even(steps, start=1.0, end=0.0):
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def line(velocity, x, times):
    return geometry.trajectory(ode.RK4, velocity, x, times)


def test_a_trajectory_is_the_run_with_its_velocities():
    x, times = normal((3, 2)), even(5)
    actual = line(curved, x, times)
    assert torch.equal(actual.states, ode.integrate(ode.RK4, curved, x, times, save="all"))
    for state, slope, t in zip(actual.states, actual.slopes, times, strict=True):
        assert torch.equal(slope, curved(state, t))


def test_straight_lines_have_no_straightness_to_lose_and_no_detour():
    drift = normal((3, 2, 2), 1)
    actual = line(lambda x, t: drift, normal((3, 2, 2)), even(4))
    assert geometry.straightness(actual).max() < 1e-25
    torch.testing.assert_close(geometry.detour(actual), torch.ones(3, dtype=torch.float64))


def test_a_straight_line_at_changing_speed_is_no_detour_but_not_straight_in_time():
    # v = 3 t^2 d: the chord is d, and the integral of |d - 3 t^2 d|^2 is 4/5 |d|^2.
    drift = normal((3, 4), 1)
    actual = line(lambda x, t: 3 * t**2 * drift, normal((3, 4)), even(200))
    torch.testing.assert_close(geometry.detour(actual), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(geometry.straightness(actual), 0.8 * drift.square().sum(1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("span", [(1.0, 0.0), (0.2, 0.9)])
def test_a_circle_is_as_crooked_as_its_arc(span):
    # Over an angle a of a circle of radius r in time T: speed r w, chord 2 r sin(a / 2), so the integral of
    # |chord / T - v|^2 is T (r w)^2 - chord^2 / T, and the detour is a / (2 sin(a / 2)).
    x = normal((3, 2))
    radius, time = x.norm(dim=1), abs(span[1] - span[0])
    angle, chord = 2 * time, 2 * radius * math.sin(time)
    actual = line(rotation, x, even(400, *span))
    torch.testing.assert_close(
        geometry.straightness(actual), time * (2 * radius) ** 2 - chord**2 / time, rtol=1e-4, atol=0
    )
    torch.testing.assert_close(geometry.detour(actual), angle * radius / chord, rtol=1e-4, atol=0)


def test_every_sample_may_have_a_grid_of_its_own():
    x = normal((2, 2))
    grids = torch.stack([even(50), even(50, 0.9, 0.2)], 1)
    batched = geometry.straightness(line(curved, x, grids))
    for i in range(2):
        alone = geometry.straightness(line(curved, x[i : i + 1], grids[:, i]))
        torch.testing.assert_close(batched[i : i + 1], alone)


def test_the_curvature_of_a_circle_is_one_over_its_radius():
    x = normal((5, 2))
    torch.testing.assert_close(geometry.curvature(rotation, x, HALF), 1 / x.norm(dim=1))
    # It does not depend on the speed along the circle.
    quick = geometry.curvature(lambda x, t: (3 + t) ** 2 * rotation(x, t), x, HALF)
    torch.testing.assert_close(quick, 1 / x.norm(dim=1))


def test_the_acceleration_of_a_linear_flow_in_time_has_both_its_parts():
    # v = (1 + t) A x: dv/dt along the line is A x + (1 + t)^2 A A x.
    x, matrix = normal((3, 4)), normal((4, 4), 1)
    expected = x @ matrix.T + 1.5**2 * x @ (matrix @ matrix).T
    actual = geometry.acceleration(lambda x, t: (1 + path.broadcast(t, x)) * (x @ matrix.T), x, HALF)
    torch.testing.assert_close(actual, expected)
    each = geometry.acceleration(lambda x, t: (1 + path.broadcast(t, x)) * (x @ matrix.T), x, HALF.expand(3))
    torch.testing.assert_close(each, expected)


def test_the_acceleration_is_the_difference_quotient_of_the_velocity_along_the_line():
    x, step = normal((3, 4)), 1e-4
    ahead = ode.integrate(ode.RK4, curved, x, even(1, 0.5, 0.5 + step))
    quotient = (curved(ahead, HALF + step) - curved(x, HALF)) / step
    torch.testing.assert_close(geometry.acceleration(curved, x, HALF), quotient, rtol=1e-3, atol=1e-3)


def test_the_jacobian_of_a_linear_field_has_the_singular_values_of_its_matrix():
    matrices = normal((3, 8, 8), 1)

    def linear(x, t):
        return (1 + t) * torch.einsum("bij,bj->bi", matrices, x.flatten(1)).reshape(x.shape)

    x = normal((3, 2, 4))
    actual = geometry.singular_values(linear, x, HALF, prng.key(5), count=3, oversample=5)
    left, values, right = torch.linalg.svd(1.5 * matrices)
    torch.testing.assert_close(actual.values, values[:, :3])
    assert actual.left.shape == actual.right.shape == (3, 3, 2, 4)
    for k in range(3):
        torch.testing.assert_close((actual.right[k].flatten(1) * right[:, k]).sum(1).abs(), torch.ones(3).double())
        torch.testing.assert_close((actual.left[k].flatten(1) * left[:, :, k]).sum(1).abs(), torch.ones(3).double())
        _, image = torch.func.jvp(lambda x: linear(x, HALF), (x,), (actual.right[k],))
        torch.testing.assert_close(image, actual.values[:, k, None, None] * actual.left[k])


def test_a_velocity_of_16_bits_is_analysed_in_the_dtype_of_x():
    def halved(x, t):
        return (0.5 * x).to(torch.bfloat16)

    x, other = normal((2, 8)).float().unbind()
    values = geometry.singular_values(halved, x[None], HALF, prng.key(0), count=2).values
    torch.testing.assert_close(values, torch.full((1, 2), 0.5), rtol=1e-2, atol=0)
    assert geometry.lipschitz_between(halved, x[None], other[None], HALF).dtype == torch.float32


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.floats(0.0, 1.0))
def test_few_probes_come_close_to_the_norm_of_the_jacobian_from_below_and_pairs_never_pass_it_by(seed, time):
    x, t = normal((2, 6), seed), torch.tensor(time, dtype=torch.float64)
    jacobian = torch.stack([torch.func.jacrev(lambda x: curved(x[None], t)[0])(row) for row in x])
    exact = torch.linalg.matrix_norm(jacobian, 2)
    actual = geometry.lipschitz(curved, x, t, prng.key(seed))
    assert (actual <= exact * (1 + 1e-12)).all() and (actual >= 0.99 * exact).all()
    near = x + 1e-6 * normal((2, 6), seed + 1)
    assert (geometry.lipschitz_between(curved, x, near, t) <= exact * (1 + 1e-4)).all()


def test_the_lipschitz_quotient_of_a_linear_field_along_a_singular_direction_is_its_singular_value():
    matrix = normal((5, 5), 1)
    _, values, right = torch.linalg.svd(matrix)
    x = normal((5, 5))
    actual = geometry.lipschitz_between(lambda x, t: x @ matrix.T, x, x + right, HALF)
    torch.testing.assert_close(actual, values)


def test_a_samples_geometry_does_not_depend_on_its_batch_nor_on_chunks():
    x = normal((3, 6))
    batched = geometry.singular_values(curved, x, HALF, prng.key(1), count=2)
    chunked = geometry.singular_values(curved, x, HALF, prng.key(1), count=2, chunk_size=2)
    torch.testing.assert_close(batched, chunked)
    first = geometry.singular_values(curved, x[:1], HALF, prng.key(1), count=2)
    torch.testing.assert_close(batched.values[:1], first.values)
    torch.testing.assert_close(geometry.curvature(curved, x, HALF)[1:2], geometry.curvature(curved, x[1:2], HALF))


def test_geometry_is_mapped_differentiated_and_compiled():
    many = normal((2, 3, 4))
    measures = {
        "straightness": lambda x: geometry.straightness(line(curved, x, even(3))),
        "curvature": lambda x: geometry.curvature(curved, x, HALF),
        "lipschitz": lambda x: geometry.lipschitz(curved, x, HALF, prng.key(2), iterations=1),
    }
    for name, measure in measures.items():
        loop = torch.stack([measure(x) for x in many])
        torch.testing.assert_close(torch.func.vmap(measure)(many), loop, msg=name)
        x = many[0].clone().requires_grad_()
        assert torch.autograd.gradcheck(measure, (x,), atol=1e-4, rtol=1e-3), name
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: [fn(x) for fn in measures.values()], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(many[0]), [fn(many[0]) for fn in measures.values()])


def test_the_jacobian_of_the_guided_model_by_the_same_few_products():
    model = models.random_model()
    conditions = pipeline.encode(*models.parts(model), ["a red circle", "a blue star"])
    velocity = pipeline.velocity(model.params, model.config, conditions, 3.0)
    x, t = normal((2, model.config.transformer.in_channels, 2, 2)).float(), torch.tensor(0.6)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        actual = geometry.lipschitz(velocity, x, t, prng.key(0), probes=6, iterations=6)
        straight = geometry.straightness(geometry.trajectory(ode.EULER, velocity, x, [1.0, 0.5, 0.0]))
        # A scalar time, and one a sample, are differentiated alike.
        bend, each = geometry.curvature(velocity, x, t), geometry.curvature(velocity, x, t.expand(2))
        jacobian = torch.func.vmap(
            lambda tangent: torch.func.jvp(lambda x: velocity(x, t), (x,), (tangent,))[1], chunk_size=16
        )(torch.eye(x[0].numel()).reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape))
    exact = torch.linalg.matrix_norm(jacobian.flatten(2).permute(1, 2, 0), 2)
    torch.testing.assert_close(actual, exact, rtol=1e-2, atol=0)
    assert (straight > 0).all() and bend.shape == (2,)
    torch.testing.assert_close(bend, each)


def test_more_values_than_a_sample_has_elements_are_refused():
    with pytest.raises(ValueError, match="count 7 must be between 1 and the 6 elements"):
        geometry.singular_values(curved, normal((2, 6)), HALF, prng.key(0), count=7)
