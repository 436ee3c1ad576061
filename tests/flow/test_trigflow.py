"""TrigFlow and the rectified flow as one another: inverses, and the closed form of a Gaussian flow."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functional_sd3.flow import path, trigflow
from tests.flow.ode.flows import MEAN, STD, gaussian_field, noise

ANGLES = torch.linspace(0, math.pi / 2, 9, dtype=torch.float64)


@given(st.floats(0, 1))
def test_angles_and_times_are_inverse(t):
    t = torch.tensor(t, dtype=torch.float64)
    a = trigflow.angle(t)
    assert 0 <= a <= math.pi / 2
    torch.testing.assert_close(trigflow.time(a), t, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(trigflow.scale(a), (t**2 + (1 - t) ** 2).sqrt(), rtol=1e-14, atol=0)


def test_the_two_paths_are_the_same_points_and_speeds():
    x0, e = noise((9, 2), seed=1), noise((9, 2), seed=2)
    a = ANGLES
    y = a.cos()[:, None] * x0 + a.sin()[:, None] * e
    t = trigflow.time(a)
    torch.testing.assert_close(trigflow.scale(a)[:, None] * y, path.interpolate(x0, e, t), rtol=1e-13, atol=1e-14)
    speed = trigflow.from_flow(lambda x, t: path.target(x0, e))(y, a)
    torch.testing.assert_close(speed, a.cos()[:, None] * e - a.sin()[:, None] * x0, rtol=1e-13, atol=1e-14)


def test_velocities_transform_there_and_back():
    field = lambda x, t: torch.tanh(x) * t[:, None] - 0.3 * x.roll(1, -1)  # noqa: E731
    x, t = noise((9, 2)), torch.linspace(0, 1, 9, dtype=torch.float64)
    back = trigflow.to_flow(trigflow.from_flow(field))
    torch.testing.assert_close(back(x, t), field(x, t), rtol=1e-12, atol=1e-13)
    forth = trigflow.from_flow(trigflow.to_flow(field))
    torch.testing.assert_close(forth(x, ANGLES), field(x, ANGLES), rtol=1e-12, atol=1e-13)


def test_the_consistency_function_is_the_prediction_of_the_data():
    x, t = noise((9, 2)), torch.linspace(0, 1, 9, dtype=torch.float64)
    a = trigflow.angle(t)
    y = x / trigflow.scale(a)[:, None]
    f = trigflow.consistency(y, trigflow.from_flow(gaussian_field)(y, a), a)
    torch.testing.assert_close(f, path.denoised(x, gaussian_field(x, t), t), rtol=1e-12, atol=1e-13)


def gaussian_consistency(x, t):
    """The end of the Gaussian flow through x at t: every x_t keeps its number of standard deviations."""
    t = path.broadcast(t, x)
    return MEAN + STD * (x - (1 - t) * MEAN) / torch.sqrt((1 - t) ** 2 * STD**2 + t**2)


def test_the_flow_of_a_gaussian_in_angles_ends_where_the_closed_form_says():
    y, steps = noise((5, 3)), 2000
    x, F = y, trigflow.from_flow(gaussian_field)
    grid = torch.linspace(math.pi / 2, 0, steps + 1, dtype=torch.float64)
    for a, b in zip(grid[:-1], grid[1:], strict=True):
        middle = x + (b - a) / 2 * F(x, a)
        x = x + (b - a) * F(middle, (a + b) / 2)
    torch.testing.assert_close(x, gaussian_consistency(y, torch.tensor(1.0, dtype=torch.float64)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_one_time_for_all_is_that_time_for_each(t):
    x, t = noise((3, 2)), torch.tensor(t, dtype=torch.float64)
    a = trigflow.angle(t)
    field = lambda x, t: x * path.broadcast(t, x)  # noqa: E731
    torch.testing.assert_close(trigflow.from_flow(field)(x, a), trigflow.from_flow(field)(x, a.expand(3)))
    torch.testing.assert_close(trigflow.to_flow(field)(x, t), trigflow.to_flow(field)(x, t.expand(3)))
