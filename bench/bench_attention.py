"""Attention's derivatives beside the formula, and the tangent of an MMDiT beside a training step."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jvp, vmap

from functional_sd3.core import attention, prng, transform
from functional_sd3.transformer import mmdit


def loss(attend, *inputs):
    return attend(*inputs).square().sum()


def gradient(attend, *inputs):
    return grad(partial(loss, attend), argnums=(0, 1, 2))(*inputs)


def gradient_square(attend, *inputs):
    return sum(each.square().sum() for each in gradient(attend, *inputs))


DERIVATIVES = {
    "forward": lambda attend, inputs, along: attend(*inputs),
    "gradient": lambda attend, inputs, along: gradient(attend, *inputs)[0],
    "jvp": lambda attend, inputs, along: jvp(attend, inputs, along)[1],
    "hvp, forward over reverse,": lambda attend, inputs, along: jvp(partial(gradient, attend), inputs, along)[1][0],
    "hvp, reverse over reverse,": lambda attend, inputs, along: grad(partial(gradient_square, attend))(*inputs),
    "vmap of the gradient": lambda attend, inputs, along: vmap(partial(gradient, attend))(*(x[None] for x in inputs))[
        0
    ],
}


def drawn(tokens):
    inputs = tuple(prng.normal(key, (1, 8, tokens, 64)) for key in prng.split(prng.key(0), 3))
    return inputs, tuple(x.cos() for x in inputs)


@pytest.mark.parametrize("tokens", [1024, 4096])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivative(versus, name, tokens):
    inputs, along = drawn(tokens)
    versus(
        f"{name} of attention, 8 heads of 64, {tokens:,} tokens",
        lambda: DERIVATIVES[name](attention.attention, inputs, along),
        lambda: DERIVATIVES[name](partial(attention.attention, implementation="math"), inputs, along),
        peer="formula",
        rounds=3 if tokens > 1024 else 7,
        memory=True,
    )


@pytest.mark.parametrize("with_gradient", [False, True], ids=["forward", "forward and gradient"])
def test_first_order(versus, with_gradient):
    (query, key, value), _ = drawn(1024)
    query.requires_grad_(with_gradient)

    def run(attend):
        out = attend(query, key, value)
        return torch.autograd.grad(out.sum(), query)[0] if with_gradient else out

    versus(
        f"attention, {'forward and gradient' if with_gradient else 'forward'}, 8 heads of 64, 1,024 tokens",
        lambda: run(attention.attention),
        lambda: run(F.scaled_dot_product_attention),
        peer="PyTorch",
        grad=with_gradient,
    )


def test_tangent_of_an_mmdit(versus):
    config = mmdit.Config(depth=4, heads=8, position_size=96, sample_size=64, qk_norm=True)
    params = mmdit.init(prng.key(0), config)
    keys = prng.split(prng.key(1), 3)
    shapes = (1, 16, 64, 64), (1, 154, 4096), (1, 2048)
    latents, context, pooled = (prng.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    t = torch.tensor([0.4])

    def velocity(latents, t, params=params):
        return mmdit.apply(params, config, latents, t, context, pooled)

    def step():
        return transform.value_and_grad(lambda params: (velocity(latents, t, params) - latents).square().mean())(params)

    versus(
        "tangent of an MMDiT (4 blocks of width 512, 1,024 + 154 tokens) beside a training step",
        lambda: jvp(velocity, (latents, t), (latents, torch.ones_like(t)))[1],
        step,
        peer="training step",
        tolerance=None,
        memory=True,
    )
