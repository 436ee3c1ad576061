"""Layers: each equals its formula under autograd, transforms, compilers and modes."""

import pytest
import torch
import torch.nn.functional as F

from functional_sd3.core import layers, prng
from tests import choices
from tests.operations import counted


@pytest.fixture(autouse=True)
def small_layers_by_one_dnn(monkeypatch):
    choices.use(monkeypatch)


MEANT = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def drawn(*shape, seed=0):
    return prng.normal(prng.key(seed), shape)


@pytest.mark.parametrize("shape", [(5, 16), (2, 7, 16), (2, 3, 4, 16), (0, 16), (16,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", MEANT)
def test_a_fused_hidden_layer_is_the_product_and_then_its_activation(shape, bias, activation):
    params = {"weight": drawn(24, 16, seed=1)} | ({"bias": drawn(24, seed=2)} if bias else {})
    x = drawn(*shape)
    expected = MEANT[activation](F.linear(x, params["weight"], params.get("bias")))
    torch.testing.assert_close(layers.linear_activation(params, x, activation), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("activation", MEANT)
def test_a_hidden_layer_has_its_derivatives_and_leaves_its_input_alone(activation):
    params = {"weight": drawn(24, 16, seed=1), "bias": drawn(24, seed=2)}
    x = drawn(5, 16)
    before = x.clone()

    def total(params):
        return layers.linear_activation(params, x, activation).square().sum()

    def plainly(params):
        return MEANT[activation](F.linear(x, params["weight"], params["bias"])).square().sum()

    actual, expected = torch.func.grad(total)(params), torch.func.grad(plainly)(params)
    for name in params:
        torch.testing.assert_close(actual[name], expected[name])
    assert torch.equal(x, before)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    total(leaves).backward()
    torch.testing.assert_close(leaves["weight"].grad, expected["weight"])


class Special(torch.Tensor):
    pass


def operations(run):
    return counted(run)[1]


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize(
    ("run", "rows", "alone"),
    [
        (lambda params, x: layers.linear_activation(params, x, "gelu_tanh"), 5, True),
        (layers.linear, 5, False),
        (layers.linear, 15, False),
        (layers.linear, 16, True),
        (layers.linear, 512, True),
        (layers.linear, 513, False),
    ],
)
def test_one_dnn_computes_a_layer_where_it_is_enabled_and_faster_and_never_else(run, rows, alone):
    params, x = {"weight": drawn(24, 16, seed=1), "bias": drawn(24, seed=2)}, drawn(1, rows, 16)
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    assert ("_linear_pointwise" in operations(lambda: run(params, x))) == (there and alone)
    with torch.backends.mkldnn.flags(enabled=False):
        names = operations(lambda: run(params, x))
    assert "_linear_pointwise" not in names and {"mm", "addmm"} & set(names)
    watched = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    assert "_linear_pointwise" not in operations(lambda: run(watched, x))
    # Tensors with rules of their own have none for this.
    special = {name: leaf.as_subclass(Special) for name, leaf in params.items()}
    assert "_linear_pointwise" not in operations(lambda: run(special, x))


@pytest.mark.parametrize("rows", [16, 200])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_layer_is_the_same_by_one_dnn(rows, bias):
    params = {"weight": drawn(24, 16, seed=1)} | ({"bias": drawn(24, seed=2)} if bias else {})
    x = drawn(2, rows // 2, 16)
    expected = F.linear(x, params["weight"], params.get("bias"))
    torch.testing.assert_close(layers.linear(params, x), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("extra", ["low_rank", "scale"])
def test_a_hidden_layer_with_something_beside_its_weight_is_not_computed_without_it(extra):
    params = {"weight": drawn(24, 16, seed=1), "bias": drawn(24, seed=2)}
    beside = {"low_rank": {"down": drawn(2, 16, seed=3), "up": drawn(24, 2, seed=4)}, "scale": drawn(24, seed=5).abs()}
    params |= {extra: beside[extra]}
    x = drawn(3, 5, 16)
    expected = F.gelu(layers.linear(params, x), approximate="tanh")
    torch.testing.assert_close(layers.linear_activation(params, x, "gelu_tanh"), expected)


def test_the_outputs_of_a_layer_in_parts_are_its_outputs():
    params = {"weight": drawn(24, 16, seed=1), "bias": drawn(24, seed=2), "scale": drawn(24, seed=5)}
    params["low_rank"] = {"down": drawn(2, 16, seed=3), "up": drawn(24, 2, seed=4)}
    x = drawn(3, 16)
    parts = [layers.linear(part, x) for part in layers.split_outputs(params, (5, 4, 15))]
    torch.testing.assert_close(torch.cat(parts, -1), layers.linear(params, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_gelu_is_the_eager_one_at_every_size_of_number(dtype):
    # What the compiler is given is another formula; an eager backend runs it as it stands.
    def both(gelu):
        x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e12, -90.0, 90.0, 1e12])]).to(dtype)
        y = gelu(x.requires_grad_())
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    (actual, slope), (expected, expected_slope) = (
        both(torch.compile(layers.gelu_tanh, backend="eager")),
        both(layers.gelu_tanh),
    )
    # 1 + tanh has lost these digits below -5.
    close = {"rtol": 2e-6, "atol": 3e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(actual, expected, **close)
    torch.testing.assert_close(slope, expected_slope, **close)


def test_a_small_layer_is_left_to_pytorch(monkeypatch):
    monkeypatch.undo()
    params, x = {"weight": drawn(24, 16, seed=1), "bias": drawn(24, seed=2)}, drawn(64, 16)
    assert "_linear_pointwise" not in operations(lambda: layers.linear_activation(params, x, "gelu"))
