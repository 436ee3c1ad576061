"""Guidance: velocities made of velocities."""

import pytest
import torch

from functional_sd3.core import prng
from functional_sd3.flow import guidance, ode, schedule


def cond(x, t):
    return torch.tanh(x) + t


def uncond(x, t):
    return 0.5 * x - t


def network(x, t, context, extra):
    scale = t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
    return x * extra["gain"][:, None, None] + scale * context[:, None, :]


X = prng.normal(prng.key(0), (3, 2, 4))
T = torch.tensor(0.6)


def arguments(seed):
    first, second = prng.split(prng.key(seed))
    return prng.normal(first, (3, 4)), {"gain": prng.normal(second, (3,))}


def test_guidance_is_the_line_through_both_velocities():
    guided = guidance.classifier_free(cond, uncond, 4.0)(X, T)
    torch.testing.assert_close(guided, uncond(X, T) + 4 * (cond(X, T) - uncond(X, T)))


def test_scale_one_is_the_conditional_velocity_and_zero_the_unconditional():
    torch.testing.assert_close(guidance.classifier_free(cond, uncond, torch.tensor(1.0))(X, T), cond(X, T))
    assert torch.equal(guidance.classifier_free(cond, uncond, 0.0)(X, T), uncond(X, T))


@pytest.mark.parametrize("scale", [1, 1.0])
def test_the_number_one_costs_no_unconditional_evaluation(scale):
    assert guidance.classifier_free(cond, None, scale) is cond
    sizes = []

    def counted(x, t, *args):
        sizes.append(len(x))
        return network(x, t, *args)

    alone = guidance.batched(counted, arguments(1), arguments(2), scale)
    torch.testing.assert_close(alone(X, T), network(X, T, *arguments(2)))
    assert sizes == [3]


@pytest.mark.parametrize("t", [T, torch.tensor([0.1, 0.5, 0.9])])
@pytest.mark.parametrize("scale", [5.0, torch.tensor(5.0), torch.tensor([0.0, 1.0, 5.0])])
def test_one_evaluation_of_both_halves_equals_two_evaluations(t, scale):
    negative, positive = arguments(1), arguments(2)
    sizes = []

    def counted(x, t, *args):
        sizes.append(len(x))
        return network(x, t, *args)

    in_batch = guidance.batched(counted, negative, positive, scale)(X, t)
    apart = guidance.classifier_free(
        lambda x, t: network(x, t, *positive), lambda x, t: network(x, t, *negative), scale
    )(X, t)
    torch.testing.assert_close(in_batch, apart)
    assert sizes == [6]


def test_the_unconditional_half_comes_first():
    halves = []

    def fn(x, t, context):
        halves.append(context)
        return x

    guidance.batched(fn, (torch.zeros(3, 1),), (torch.ones(3, 1),), 3.0)(X, T)
    assert torch.equal(halves[0].flatten(), torch.tensor([0.0, 0, 0, 1, 1, 1]))


def test_each_sample_may_have_its_own_scale():
    scales = torch.tensor([0.0, 1.0, 7.5])
    in_batch = guidance.classifier_free(cond, uncond, scales)(X, T)
    for i, scale in enumerate(scales.tolist()):
        torch.testing.assert_close(in_batch[i], guidance.classifier_free(cond, uncond, scale)(X, T)[i])


def test_halves_in_bfloat16_are_combined_in_float32():
    guided = guidance.classifier_free(lambda x, t: cond(x, t).bfloat16(), lambda x, t: uncond(x, t).bfloat16(), 5.0)
    low, high = uncond(X, T).bfloat16().float(), cond(X, T).bfloat16().float()
    assert torch.equal(guided(X, T), low + 5 * (high - low))


def test_the_derivative_in_the_scale_is_the_difference_of_the_velocities():
    def at(scale):
        return guidance.classifier_free(cond, uncond, scale)(X, T)

    torch.testing.assert_close(torch.func.jacrev(at)(torch.tensor(3.0)), cond(X, T) - uncond(X, T))
    scales = torch.tensor([0.5, 2.0, 9.0])
    torch.testing.assert_close(torch.func.vmap(at)(scales), torch.stack([at(s) for s in scales.tolist()]))


def test_a_guided_run_compiles_to_one_graph():
    negative, positive = arguments(1), arguments(2)

    def image(x, scale, times):
        return ode.integrate(ode.EULER, guidance.batched(network, negative, positive, scale), x, times)

    inputs = (X, torch.tensor(4.0), schedule.sigmas(3))
    compiled = torch.compile(image, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), image(*inputs))
