"""Gradients of the end of a flow: the three ways agree, and their memory is the stated one."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

from bench.timing import allocated_peak
from functional_sd3 import lora, pipeline
from functional_sd3.core import prng, transform, tree
from functional_sd3.flow import ode, path, schedule
from functional_sd3.flow.analysis import adjoint
from functional_sd3.image import vae
from tests import models

METHODS = pytest.mark.parametrize("method", ode.METHODS.values(), ids=ode.METHODS)
ONE_STEP = pytest.mark.parametrize(
    ("method", "counts"),
    [(ode.EULER, (64, 128)), (ode.MIDPOINT, (24, 48)), (ode.HEUN, (24, 48)), (ode.AB2, (24, 48)), (ode.RK4, (6, 12))],
    ids=lambda value: getattr(value, "name", None),
)


def normal(shape, seed=0, dtype=torch.float64):
    return prng.normal(prng.key(seed), shape, dtype)


def field(args, x, t):
    return torch.tanh(x @ args["weight"]) * (1 + path.broadcast(t, x)) - args["pull"] * x


ARGS = {"weight": normal((3, 3)) / 2, "pull": torch.tensor(0.3, dtype=torch.float64)}
X, COVECTOR = normal((4, 3), 1), normal((4, 3), 2)


def even(steps):
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def plain(method, args, x, times):
    return ode.integrate(method, partial(field, args), x, times)


def checkpointed(method, args, x, times):
    return plain(adjoint.checkpointed(method), args, x, times)


def continuous(method, args, x, times, **options):
    return adjoint.continuous(method, field, args, x, times, **options)


def pairing(way, method, *options):
    return lambda args, x, times: (COVECTOR * way(method, args, x, times)).sum()


def gradients(way, method, times, args=ARGS, x=X):
    return transform.value_and_grad(pairing(way, method), (0, 1, 2))(args, x, times)[0]


def distance(first, second):
    pairs = zip(tree.leaves(first), tree.leaves(second), strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)


@METHODS
def test_checkpointed_steps_have_the_values_and_gradients_of_plain_ones(method):
    times = schedule.sigmas(5).double()
    assert torch.equal(checkpointed(method, ARGS, X, times), plain(method, ARGS, X, times))
    ours, theirs = (gradients(way, method, times) for way in (checkpointed, plain))
    assert distance(ours, theirs) < 1e-12 and all(leaf.abs().max() > 1e-3 for leaf in tree.leaves(theirs))


@METHODS
def test_checkpointed_methods_are_methods_under_every_transform(method):
    times = schedule.sigmas(4).double()
    again = adjoint.checkpointed(method)
    assert (again.name, again.order, again.evaluations) == (method.name, method.order, method.evaluations)
    mapped = vmap(grad(pairing(checkpointed, method), 1), in_dims=(None, 0, None))(ARGS, torch.stack([X, -X]), times)
    torch.testing.assert_close(mapped[1], grad(pairing(plain, method), 1)(ARGS, -X, times))
    tangent = jvp(lambda x: checkpointed(method, ARGS, x, times), (X,), (COVECTOR,))[1]
    torch.testing.assert_close(tangent, jvp(lambda x: plain(method, ARGS, x, times), (X,), (COVECTOR,))[1])


def test_a_checkpointed_run_compiles_to_one_graph():
    times = schedule.sigmas(4).double()
    torch._dynamo.reset()
    compiled = torch.compile(grad(pairing(checkpointed, ode.HEUN_EDM), 1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ARGS, X, times), grad(pairing(plain, ode.HEUN_EDM), 1)(ARGS, X, times))


@ONE_STEP
def test_the_continuous_adjoint_converges_to_the_gradient_of_the_steps_with_their_order(method, counts):
    # In the noise and the arguments alone: between its ends the exact flow does not depend on the times.
    errors = [
        distance(gradients(continuous, method, even(n))[:2], gradients(plain, method, even(n))[:2]) for n in counts
    ]
    assert np.log2(errors[0] / errors[1]) > method.order - 0.3
    assert errors[1] < 0.1 and errors[1] > 1e-12


def test_the_continuous_adjoint_of_a_linear_flow_is_the_transposed_exponential():
    # dx/dt = (1 + t) A x from 1 to 0: x(0) = exp(-3/2 A) x(1), so dL/dx(1) = exp(-3/2 A)^T dL/dx(0); and for A = s B
    # dL/ds = dL/dx(0) . (-3/2 B) x(0).
    matrix, scale = normal((3, 3), 3) / 2, torch.tensor(0.7, dtype=torch.float64)
    flow = torch.linalg.matrix_exp(-1.5 * scale * matrix)

    def linear(scale, x, t):
        return (1 + t) * scale * (x @ matrix.T)

    def value(scale, x, times):
        return (COVECTOR * adjoint.continuous(ode.RK4, linear, scale, x, times)).sum()

    of_scale, of_x, of_times = grad(value, (0, 1, 2))(scale, X, even(40))
    end = X @ flow.T
    torch.testing.assert_close(of_x, COVECTOR @ flow, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(of_scale, (COVECTOR * (end @ (-1.5 * matrix).T)).sum(), rtol=1e-5, atol=1e-7)
    # dL/dt at the end is a . v there; at the start -a . v, for a run that starts later misses what came before.
    torch.testing.assert_close(of_times[-1], (COVECTOR * linear(scale, end, 0)).sum(), rtol=1e-5, atol=1e-7)
    expected = -((COVECTOR @ flow) * linear(scale, X, 1)).sum()
    torch.testing.assert_close(of_times[0], expected, rtol=1e-5, atol=1e-7)
    assert not of_times[1:-1].any()


def test_the_gradient_in_the_times_of_fine_steps_becomes_that_of_the_two_ends():
    fine, exact = (gradients(way, ode.HEUN, even(96))[2] for way in (plain, continuous))
    assert fine[1:-1].abs().max() < 1e-3 * exact.abs().max()
    torch.testing.assert_close(fine[[0, -1]], exact[[0, -1]], rtol=1e-2, atol=1e-3)


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.floats(0.0, 0.4), st.floats(0.6, 1.0), st.booleans())
def test_the_three_agree_on_any_span_in_either_direction(seed, low, high, ascending):
    keys = prng.split(prng.key(seed), 2)
    args = {"weight": prng.normal(keys[0], (3, 3), torch.float64) / 2, "pull": ARGS["pull"]}
    x = prng.normal(keys[1], (4, 3), torch.float64)
    times = torch.linspace(low, high, 17, dtype=torch.float64)
    times = times if ascending else times.flip(0)
    first, second, third = (gradients(way, ode.RK4, times, args, x) for way in (plain, checkpointed, continuous))
    assert distance(first, second) < 1e-11
    assert distance(first[:2], third[:2]) < 1e-3 * max(1.0, distance(first[:2], tree.map(torch.zeros_like, first[:2])))


@pytest.mark.parametrize("way", [plain, checkpointed, continuous])
def test_autograd_torch_func_and_value_and_grad_give_one_gradient(way):
    times = even(6)
    expected = gradients(way, ode.HEUN, times)
    assert distance(grad(pairing(way, ode.HEUN), (0, 1, 2))(ARGS, X, times), expected) < 1e-12
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), (ARGS, X, times))
    actual = torch.autograd.grad(pairing(way, ode.HEUN)(*leaves), tree.leaves(leaves))
    assert distance(actual, tree.leaves(expected)) < 1e-12


def test_the_continuous_adjoint_is_mapped_over_its_arguments_and_its_start():
    times, xs = even(6), torch.stack([X, -X])
    many = tree.map(lambda leaf: torch.stack([leaf, 2 * leaf]), ARGS)
    fn = grad(pairing(continuous, ode.HEUN), (0, 1))
    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        mapped = vmap(fn, in_dims=(0, 0, None))(many, xs, times)
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(True)
    for index in range(2):
        alone = fn(tree.map(lambda leaf, index=index: leaf[index], many), xs[index], times)
        assert distance(tree.map(lambda leaf, index=index: leaf[index], mapped), alone) < 1e-12


def test_second_derivatives_of_the_continuous_adjoint_converge_to_those_of_the_steps():
    def square(way, steps):
        return grad(lambda x: grad(pairing(way, ode.RK4), 1)(ARGS, x, even(steps)).square().sum())(X)

    errors = [float((square(continuous, steps) - square(plain, steps)).abs().max()) for steps in (6, 12)]
    assert np.log2(errors[0] / errors[1]) > 3.5 and errors[1] < 1e-3


def test_the_backward_integration_may_have_another_method_and_another_grid():
    exact, times = gradients(plain, ode.RK4, even(64)), even(64)

    def error(**options):
        return distance(gradients(partial(continuous, **options), ode.RK4, times)[:2], exact[:2])

    coarse, fine = (error(backward_times=even(steps).flip(0)) for steps in (4, 16))
    assert coarse > 50 * fine > 50 * error()
    assert error(backward=ode.EULER) > coarse


def test_adaptive_steps_back_meet_their_tolerance():
    exact = gradients(plain, ode.RK4, even(200))
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    errors = []
    for tolerance in (1e-4, 1e-8):
        way = partial(continuous, rtol=tolerance, atol=tolerance)
        errors.append(distance(gradients(way, ode.DOPRI5, ends)[:2], exact[:2]))
    assert errors[1] < 1e-6 and errors[1] < errors[0] / 30 < 1e-2


def test_a_velocity_in_another_dtype_and_a_start_in_bfloat16_have_gradients_in_their_own():
    args = tree.cast(ARGS, torch.bfloat16)
    x = X.bfloat16()

    def value(args, x):
        def low(args, x, t):
            return field(args, x.bfloat16(), t.bfloat16())

        return (COVECTOR * adjoint.continuous(ode.HEUN, low, args, x, even(8))).sum()

    of_args, of_x = transform.value_and_grad(value, (0, 1))(args, x)[0]
    assert {leaf.dtype for leaf in [of_x, *tree.leaves(of_args)]} == {torch.bfloat16}
    expected = gradients(continuous, ode.HEUN, even(8))
    torch.testing.assert_close(of_x.double(), expected[1], rtol=0.1, atol=0.1)


# What is kept. One state is WIDE bytes, and an evaluation of `deep` keeps a dozen of them.
WIDE = 200 * 64 * 4


def deep(args, x, t):
    for _ in range(6):
        x = x + torch.sin(x) * args["scale"]
    return x


def peak(way, steps):
    args, x, times = (
        {"scale": torch.tensor(0.01)},
        normal((200, 64), dtype=torch.float32),
        torch.linspace(1, 0, steps + 1),
    )

    def value(args, x):
        if way == "continuous":
            return adjoint.continuous(ode.HEUN, deep, args, x, times).square().mean()
        method = ode.HEUN if way == "plain" else adjoint.checkpointed(ode.HEUN)
        return ode.integrate(method, partial(deep, args), x, times).square().mean()

    return allocated_peak(lambda: transform.value_and_grad(value, (0, 1))(args, x)) / WIDE


@pytest.mark.parametrize(
    ("way", "least", "most"), [("plain", 20, 100), ("checkpointed", 0.9, 1.5), ("continuous", 0, 0.1)]
)
def test_memory_grows_by_all_a_step_keeps_by_one_state_a_step_or_not_at_all(way, least, most):
    assert least <= (peak(way, 24) - peak(way, 8)) / 16 <= most


def test_leaves_that_need_no_gradient_cost_none_in_the_backward_integration():
    frozen, scale = torch.ones(1000, 1000), torch.tensor(0.1, requires_grad=True)

    def product(args, x, t):
        return (x @ args["frozen"]) * args["scale"] / 1000

    def run(frozen):
        args = {"frozen": frozen, "scale": scale}
        value = adjoint.continuous(ode.EULER, product, args, torch.ones(1, 1000), torch.linspace(1, 0, 5)).sum()
        return torch.autograd.grad(value, scale)

    tracked = frozen.clone().requires_grad_()
    size = frozen.numel() * 4
    assert allocated_peak(lambda: run(frozen)) < size < allocated_peak(lambda: run(tracked))


# The whole program.


@pytest.fixture(scope="module")
def whole():
    model = models.random_model()
    config = model.config
    conditions = pipeline.encode(*models.parts(model), ["a large red circle"])
    params = tree.cast({"transformer": model.params["transformer"], "vae": model.params["vae"]}, torch.float64)
    style = lora.init(prng.key(3), config, 2, "transformer.blocks.1.image.attention.*", dtype=torch.float64)
    shaken = tree.map_with_path(
        lambda path, leaf: leaf if path.endswith("alpha") else leaf + 0.05 * normal(leaf.shape, len(path)), style
    )
    args = {
        "conditions": tree.cast(conditions, torch.float64),
        "cfg": torch.tensor(3.0, dtype=torch.float64),
        "lora": shaken,
    }
    noise = normal((1, config.transformer.in_channels, 4, 4), 5)

    def velocity(args, x, t):
        adapted = lora.apply(params, args["lora"], lazy=True)
        return pipeline.velocity(adapted, config, args["conditions"], args["cfg"])(x, t)

    def redness(latents):
        # The decoder itself: `pipeline.decode` rounds to float32.
        images = vae.decode(params["vae"], config.vae, vae.denormalize(config.vae, latents))
        red, green, blue = images.mean((0, 2, 3))
        return red - (green + blue) / 2

    return velocity, redness, args, noise


def ways(velocity, redness, method):
    return {
        "plain": lambda args, x, times: redness(ode.integrate(method, partial(velocity, args), x, times)),
        "checkpointed": lambda args, x, times: redness(
            ode.integrate(adjoint.checkpointed(method), partial(velocity, args), x, times)
        ),
        "continuous": lambda args, x, times: redness(adjoint.continuous(method, velocity, args, x, times)),
    }


def test_an_images_redness_has_gradients_in_noise_prompt_guidance_lora_and_times_that_agree(whole):
    velocity, redness, args, noise = whole
    actual = {
        name: transform.value_and_grad(value, (0, 1, 2))(args, noise, even(6))[0]
        for name, value in ways(velocity, redness, ode.RK4).items()
    }
    exact = actual["plain"]
    parts = [exact[0]["conditions"], exact[0]["cfg"], exact[0]["lora"], exact[1], exact[2]]
    assert all(max(leaf.abs().max() for leaf in tree.leaves(part)) > 1e-6 for part in parts)
    assert distance(actual["checkpointed"], exact) < 1e-10
    for ours, theirs in zip(tree.leaves(actual["continuous"][:2]), tree.leaves(exact[:2]), strict=True):
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm() + 1e-9


def test_the_gradient_of_the_program_is_the_difference_quotient(whole):
    velocity, redness, args, noise = whole
    value = ways(velocity, redness, ode.EULER)["checkpointed"]
    times = even(4)
    direction = tree.map_with_path(lambda path, leaf: normal(leaf.shape, 7 + len(path)), (args, noise))
    step = 1e-5
    ahead, behind = (tree.map(lambda a, d, s=s: a + s * step * d, (args, noise), direction) for s in (1, -1))
    quotient = (value(*ahead, times) - value(*behind, times)) / (2 * step)
    actual = transform.value_and_grad(value, (0, 1))(args, noise, times)[0]
    slope = sum((one * other).sum() for one, other in zip(tree.leaves(actual), tree.leaves(direction), strict=True))
    torch.testing.assert_close(slope, quotient, rtol=1e-5, atol=1e-7)


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"times": torch.ones(3, 4)}, r"times have shape \(3, 4\).*one grid for all samples"),
        ({"times": [1.0]}, r"times have shape \(1,\)"),
        (
            {"backward_times": [0.0, 0.9]},
            "go from 0 to 0.9; they must go from the end of times, 0, back to the start, 1",
        ),
        ({"args": {"ids": torch.arange(3)}}, "ids is torch.int64; args are float tensors"),
        ({"args": {"scale": 2.0}}, "scale is float; args are float tensors"),
    ],
)
def test_what_the_continuous_adjoint_cannot_take_is_named(arguments, message):
    given = {"args": ARGS, "x": X, "times": [1.0, 0.0], **arguments}
    with pytest.raises(ValueError, match=message):
        adjoint.continuous(ode.EULER, field, **given)


def test_steps_that_are_chosen_by_values_are_not_checkpointed():
    with pytest.raises(ValueError, match="dopri5 chooses its steps"):
        adjoint.checkpointed(ode.DOPRI5)


def test_forward_mode_is_refused_and_not_wrong():
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(lambda x: continuous(ode.EULER, ARGS, x, even(2)), (X,), (X,))
