"""Layers by the functions that forward mode runs have the derivatives of their formulas, and multiply no zeros."""

from functools import partial

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

from functional_sd3.core import dispatch, layers, prng, tree
from functional_sd3.kernels import linear_functions, modulation_functions, norm_functions, single_level
from functional_sd3.transformer import mmdit
from tests import models

BATCH, TOKENS, WIDTH, OUTPUTS = 2, 3, 5, 4


def random(seed, *shape, dtype=torch.float64):
    return prng.normal(prng.key(seed), shape, dtype)


X, OTHER, THIRD = (random(seed, BATCH, TOKENS, WIDTH) for seed in (1, 2, 3))
WEIGHT, BIAS, SCALE = random(4, OUTPUTS, WIDTH), random(5, OUTPUTS), 1 + 0.1 * random(6, WIDTH)
SHIFT, GATE = random(7, BATCH, 1, WIDTH), random(8, BATCH, 1, WIDTH)
LORA = {"down": random(9, 2, WIDTH), "up": random(10, OUTPUTS, 2)}
IMAGE, KERNEL = random(12, 2, 4, 3, 2), random(13, 3, 4, 3, 3)
CHANNELS = 1 + 0.1 * random(14, 4)
# name -> (the layer of tensors, the tensors)
LAYERS = {
    "linear": (lambda x, weight, bias: layers.linear({"weight": weight, "bias": bias}, x), (X, WEIGHT, BIAS)),
    "linear without bias": (lambda x, weight: layers.linear({"weight": weight}, x), (X, WEIGHT)),
    "linear of fixed weights": (lambda x: layers.linear({"weight": WEIGHT, "bias": BIAS}, x), (X,)),
    "linear with an adapter": (
        lambda x, weight, down, up: layers.linear({"weight": weight, "low_rank": {"down": down, "up": up}}, x),
        (X, WEIGHT, LORA["down"], LORA["up"]),
    ),
    "hidden layer": (
        lambda x, weight, bias: layers.linear_activation({"weight": weight, "bias": bias}, x, "gelu_tanh"),
        (X, WEIGHT, BIAS),
    ),
    "layer norm": (lambda x: layers.layer_norm({}, x, 1e-6), (X,)),
    "layer norm with scale and shift": (
        lambda x, weight, bias: layers.layer_norm({"weight": weight, "bias": bias}, x, 1e-6),
        (X, SCALE, random(11, WIDTH)),
    ),
    "RMS norm": (lambda x, weight: layers.rms_norm({"weight": weight}, x, 1e-6), (X, SCALE)),
    "RMS norm of a fixed weight": (lambda x: layers.rms_norm({"weight": SCALE}, x, 1e-6), (X,)),
    "convolution": (
        lambda x, weight, bias: layers.conv2d({"weight": weight, "bias": bias}, x, padding=1),
        (IMAGE, KERNEL, random(15, 3)),
    ),
    "convolution of fixed weights with a stride and an adapter": (
        lambda x, down, up: layers.conv2d(
            {"weight": KERNEL, "bias": random(15, 3), "low_rank": {"down": down, "up": up}}, x, stride=2, padding=1
        ),
        (IMAGE, random(16, 2, 4, 3, 3), random(17, 3, 2)),
    ),
    "group norm": (
        lambda x, weight, bias: layers.group_norm({"weight": weight, "bias": bias}, x, 2, 1e-6),
        (IMAGE, CHANNELS, random(18, 4)),
    ),
    "group norm of fixed weights": (
        lambda x: layers.group_norm_silu({"weight": CHANNELS, "bias": random(18, 4)}, x, 2, 1e-6),
        (IMAGE,),
    ),
    "modulation": (layers.modulate, (X, SHIFT, GATE)),
    "modulation that is fixed": (lambda x: layers.modulate(x, SHIFT, GATE), (X,)),
    "gate": (layers.add_gated, (X, GATE, OTHER)),
}


def loss(layer, *inputs):
    return (layer(*inputs).square() * 0.3).sum()


def along(inputs, factor=1.0):
    return tuple((factor * x + 0.1).cos() for x in inputs)


def every(inputs):
    return tuple(range(len(inputs)))


def hvp(layer, *inputs):
    return jvp(grad(partial(loss, layer), every(inputs)), inputs, along(inputs))[1]


def stacked(inputs):
    return tuple(torch.stack([x, 0.5 * x + 0.2], dim=index % 2) for index, x in enumerate(inputs))


def dual(layer, *inputs):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, tangent) for x, tangent in zip(inputs, along(inputs), strict=True)]
        return forward_ad.unpack_dual(layer(*duals)).tangent


def leaves_within_jvp(layer, *inputs):
    """Gradients of a tangent by autograd: reverse over forward, without torch.func.grad."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    tangent = jvp(layer, tuple(leaves), along(inputs))[1]
    return torch.autograd.grad(tangent.square().sum() + leaves[0].sum(), leaves, materialize_grads=True)


def tangent_square(layer, *inputs):
    return jvp(layer, inputs, along(inputs))[1].square().sum()


COMPOSITIONS = {
    "jvp": lambda layer, *inputs: jvp(layer, inputs, along(inputs)),
    "jvp of the first alone": lambda layer, *inputs: jvp(
        lambda x: layer(x, *inputs[1:]), inputs[:1], along(inputs[:1])
    ),
    "jvp of the last alone": lambda layer, *inputs: jvp(
        lambda x: layer(*inputs[:-1], x), inputs[-1:], along(inputs[-1:])
    ),
    "forward_ad": dual,
    "jvp(grad)": hvp,
    "grad(jvp)": lambda layer, *inputs: grad(partial(tangent_square, layer), every(inputs))(*inputs),
    "autograd of jvp": leaves_within_jvp,
    "jvp(jvp)": lambda layer, *inputs: jvp(lambda *x: jvp(layer, x, along(x))[1], inputs, along(inputs, 2.0)),
    "grad(hvp)": lambda layer, *inputs: grad(
        lambda *x: sum(each.square().sum() for each in hvp(layer, *x)), every(inputs)
    )(*inputs),
    "jvp(vjp)": lambda layer, *inputs: jvp(lambda *x: vjp(layer, *x)[1](layer(*x).sin()), inputs, along(inputs)),
    "vmap(jvp)": lambda layer, *inputs: vmap(
        lambda *x: jvp(layer, x, along(x))[1], in_dims=tuple(index % 2 for index in every(inputs))
    )(*stacked(inputs)),
    "vmap(jvp) of the first": lambda layer, *inputs: vmap(
        lambda x: jvp(lambda *y: layer(*y), (x, *inputs[1:]), along((x, *inputs[1:])))[1]
    )(stacked(inputs)[0]),
    "jvp(vmap)": lambda layer, *inputs: jvp(
        vmap(layer, in_dims=tuple(index % 2 for index in every(inputs))), stacked(inputs), along(stacked(inputs))
    ),
    "jvp(vmap) of the first": lambda layer, *inputs: jvp(
        lambda x: vmap(lambda x: layer(x, *inputs[1:]))(x), stacked(inputs)[:1], along(stacked(inputs)[:1])
    ),
    "jvp(vmap) of the last": lambda layer, *inputs: jvp(
        lambda x: vmap(lambda x: layer(*inputs[:-1], x))(x),
        (torch.stack([inputs[-1], inputs[-1]]),),
        (inputs[-1].expand(2, *inputs[-1].shape),),
    ),
    "vmap(hvp)": lambda layer, *inputs: vmap(partial(hvp, layer), in_dims=tuple(index % 2 for index in every(inputs)))(
        *stacked(inputs)
    ),
    "vmap(vmap(jvp))": lambda layer, *inputs: vmap(vmap(lambda x: jvp(lambda x: layer(x, *inputs[1:]), (x,), (x,))[1]))(
        torch.stack([stacked(inputs)[0]] * 2)
    ),
    "jacfwd": lambda layer, *inputs: jacfwd(layer, every(inputs))(*inputs),
    "hessian": lambda layer, *inputs: hessian(lambda x: loss(layer, x, *inputs[1:]))(inputs[0]),
}


@pytest.fixture(autouse=True)
def slow_vmap_loops_are_errors():
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_has_the_derivatives_of_its_formula(layer, composition):
    function, inputs = LAYERS[layer]
    ours = COMPOSITIONS[composition](function, *inputs)
    with dispatch.plain():
        expected = COMPOSITIONS[composition](function, *inputs)
    for mine, formula in zip(tree.leaves(ours), tree.leaves(expected), strict=True):
        torch.testing.assert_close(mine, formula, rtol=1e-10, atol=1e-12)


def test_without_classes_of_one_level_the_formulas_run(monkeypatch):
    monkeypatch.setattr(single_level, "_is_complete", False)
    called = []
    for function in (linear_functions.Linear, norm_functions.LayerNorm, modulation_functions.AddProduct):
        monkeypatch.setattr(function, "apply", lambda *_: called.append(1))
    for layer in ("linear", "layer norm", "modulation"):
        test_a_layer_has_the_derivatives_of_its_formula(layer, "jvp(jvp)")
    assert not called


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_a_tangent_takes_the_products_of_what_varies():
    layer = {"weight": WEIGHT, "bias": BIAS}
    once = 2 * BATCH * TOKENS * WIDTH * OUTPUTS

    def gradient(x, layer):
        return grad(lambda x, layer: layers.linear(layer, x).sin().sum(), (0, 1))(x, layer)

    assert flops(lambda: jvp(partial(layers.linear, layer), (X,), (X,))) == 2 * once
    assert flops(lambda: jvp(lambda layer: layers.linear(layer, X), (layer,), (layer,))) == 2 * once
    assert flops(lambda: jvp(layers.linear, (layer, X), (layer, X))) == 3 * once
    # The output and two gradients; the tangents of the output and of either gradient in each of its factors that vary.
    assert flops(lambda: jvp(lambda x: gradient(x, layer), (X,), (X,))) == (3 + 1 + 1 + 2) * once


def test_a_tangent_of_a_convolution_takes_the_products_of_what_varies():
    layer = {"weight": KERNEL, "bias": random(15, 3)}
    conv = partial(layers.conv2d, padding=1)
    once = flops(lambda: conv(layer, IMAGE))
    assert flops(lambda: jvp(lambda x: conv(layer, x), (IMAGE,), (IMAGE,))) == 2 * once
    assert flops(lambda: jvp(lambda layer: conv(layer, IMAGE), (layer,), (layer,))) == 2 * once
    assert flops(lambda: jvp(conv, (layer, IMAGE), (layer, IMAGE))) == 3 * once


def test_a_compiled_tangent_takes_the_products_of_what_varies():
    layer, products = {"weight": WEIGHT, "bias": BIAS}, []

    def count(graph, _):
        names = [str(node.target) for node in graph.graph.nodes]
        products.append(sum(name.startswith(("aten.mm", "aten.addmm", "aten.bmm")) for name in names))
        return graph

    def both(x):
        return jvp(lambda x: layers.linear(layer, layers.layer_norm({}, x, 1e-6)), (x,), (x.cos(),))

    torch._dynamo.reset()
    compiled = torch.compile(both, backend=aot_autograd(fw_compiler=count), fullgraph=True)
    with torch.no_grad():
        for ours, expected in zip(compiled(X), both(X), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert products == [2]


def test_tangents_in_bfloat16_are_those_of_float32_to_rounding():
    for function, inputs in (LAYERS[name] for name in LAYERS if "fixed" not in name):
        wide = [x.float() for x in inputs]
        narrow = [x.bfloat16() for x in inputs]
        exact = jvp(function, tuple(wide), along(wide))[1]
        rounded = jvp(function, tuple(narrow), tuple(x.bfloat16() for x in along(wide)))[1]
        assert rounded.dtype == torch.bfloat16
        assert float((rounded.float() - exact).norm()) <= 0.03 * float(exact.norm())


def test_a_tangent_under_autocast_is_the_formulas():
    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return jvp(lambda x: layers.linear({"weight": WEIGHT.float()}, x), (X.float(),), (X.float(),))

    ours = run()
    with dispatch.plain():
        for mine, formula in zip(ours, run(), strict=True):
            torch.testing.assert_close(mine, formula, rtol=0, atol=0)


def test_second_derivatives_of_a_transformer_agree_in_every_order_of_modes():
    config = mmdit.Config(depth=2, heads=2, head_dim=8, context_width=6, pooled_width=5, position_size=4, qk_norm=True)
    params = tree.map(torch.Tensor.double, models.random_leaves(mmdit.spec(config)))
    x, v, w, u = (random(seed, 1, 16, 4, 4) for seed in range(4))
    given = torch.tensor([0.4], dtype=torch.float64), random(5, 1, 3, 6), random(6, 1, 5)

    def velocity(x):
        return mmdit.apply(params, config, x, *given)

    def tangent(x):
        return (jvp(velocity, (x,), (v,))[1] * u).sum()

    def gradient(x):
        return grad(lambda x: (velocity(x) * u).sum())(x)

    results = {
        "grad(jvp)": (grad(tangent)(x) * w).sum(),
        "jvp(jvp)": jvp(tangent, (x,), (w,))[1],
        "jvp(grad)": (jvp(gradient, (x,), (v,))[1] * w).sum(),
        "grad(grad)": (grad(lambda x: (gradient(x) * v).sum())(x) * w).sum(),
    }
    step = 1e-5
    difference = (tangent(x + step * w) - tangent(x - step * w)) / (2 * step)
    for name, result in results.items():
        torch.testing.assert_close(result, difference, rtol=1e-5, atol=1e-8, msg=name)
