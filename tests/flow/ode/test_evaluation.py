"""A velocity of one's own that returns another shape is an error, never a broadcast."""

import pytest
import torch

from functional_sd3.core import prng
from functional_sd3.flow import guidance, ode
from functional_sd3.flow.analysis import geometry, likelihood
from functional_sd3.flow.evaluation import evaluate
from functional_sd3.flow.ode import adaptive

X, TIMES = prng.normal(prng.key(0), (2, 3, 4)), torch.linspace(1, 0, 4)
WRONG = {
    "one sample": lambda x, t, *r: x[0],
    "the time": lambda x, t, *r: t,
    "part of it": lambda x, t, *r: x[:, :1],
    "nothing": lambda x, t, *r: None,
    "a pair": lambda x, t, *r: (x, t),
}


@pytest.mark.parametrize("name", ode.NAMES)
def test_no_method_broadcasts_a_velocity(name):
    method = ode.named(name, key=prng.split(prng.key(1), 2))
    for wrong in WRONG.values():
        with pytest.raises(ValueError, match=r"the velocity .* returned .*; it must return dx/dt.* \[2, 3, 4\]"):
            ode.integrate(method, wrong, X, TIMES)


def test_what_reads_a_velocity_does_not_broadcast_it_either():
    wrong = WRONG["one sample"]
    for run in (
        lambda: adaptive.solve(ode.BOSH3, wrong, X, TIMES),
        lambda: geometry.trajectory(ode.EULER, wrong, X, TIMES),
        lambda: geometry.curvature(wrong, X, torch.tensor([0.5, 0.5])),
        lambda: likelihood.divergence(wrong, X, torch.tensor(0.5)),
    ):
        with pytest.raises(ValueError, match="the velocity .* returned"):
            run()


def test_guidance_does_not_broadcast_its_velocities():
    right, wrong = lambda x, t: x, WRONG["one sample"]  # noqa: E731
    for velocity in (
        guidance.classifier_free(right, wrong, 2.0),
        guidance.classifier_free(wrong, right, 2.0),
        guidance.guided(guidance.cfg(2.0), {"positive": right, "negative": wrong}),
    ):
        with pytest.raises(ValueError, match=r"the velocity .*<lambda> returned a tensor \[3, 4\]"):
            velocity(X, TIMES[0])


def test_an_evaluation_has_the_dtype_of_x_whatever_that_of_the_velocity():
    assert evaluate(lambda x, t: x.half(), X, TIMES[0]).dtype == torch.float32


@pytest.mark.parametrize("method", ["euler", None, ode.EULER.step])
def test_what_is_no_method_is_an_error_that_says_where_methods_are(method):
    for run in (
        lambda: ode.integrate(method, lambda x, t: x, X, TIMES),
        lambda: ode.start(method, X, TIMES[0]),
        lambda: adaptive.solve(method, lambda x, t: x, X, TIMES),
    ):
        with pytest.raises(ValueError, match=r"^method .* must be .*ode\."):
            run()
