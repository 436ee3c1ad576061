"""The fast 3x3 convolution: as accurate as float32 allows, and used only where it may be."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3.core import layers, prng
from functional_sd3.kernels import winograd
from tests import choices


@pytest.fixture(autouse=True)
def where_it_is_faster(monkeypatch):
    choices.use(monkeypatch)


def drawn(seed, batch, inputs, outputs, height, width):
    keys = prng.split(prng.key(seed), 3)
    x = prng.normal(keys[0], (batch, inputs, height, width)).contiguous(memory_format=torch.channels_last)
    weight = prng.normal(keys[1], (outputs, inputs, 3, 3)) / (9 * inputs) ** 0.5
    return weight, prng.normal(keys[2], (outputs,)), x


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**31),
    st.integers(1, 2),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 2, 3, 100]),
    st.sampled_from([1, 40]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.booleans(),
)
def test_it_equals_the_direct_sum(seed, batch, inputs, outputs, rows, columns, at_once, tiles, scale, more, inplace):
    outputs, scale = (inputs, 1) if inplace else (outputs, scale)
    weight, bias, x = drawn(seed, batch, inputs, outputs, 4 // scale * rows, 4 // scale * columns)
    residual = prng.normal(prng.key(seed + 1), (batch, outputs, 4 * rows, 4 * columns)) if more else None
    expected = F.conv2d(F.interpolate(x, scale_factor=scale).double(), weight.double(), bias.double(), padding=1)
    expected += 0 if residual is None else residual
    before = x.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "SMALL_KERNEL", 0)
        patch.setattr(winograd, "ROWS_AT_ONCE", at_once)
        patch.setattr(winograd, "TILES_AT_ONCE", tiles)
        patch.setattr(winograd, "KEPT", 7 * inputs * outputs)  # a kernel in several parts
        found = winograd.convolve(weight, bias, x, scale=scale, residual=residual, inplace=inplace)
    assert found.shape == expected.shape and found.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).norm() <= 5e-6 * expected.norm()
    assert found.data_ptr() == x.data_ptr() if inplace else torch.equal(x, before)


def test_large_convolutions_take_it_and_are_the_same_to_five_millionths(monkeypatch):
    weight, bias, x = drawn(0, 2, 64, 96, 48, 64)
    calls = []
    monkeypatch.setattr(winograd, "convolve", lambda *a, original=winograd.convolve: calls.append(1) or original(*a))
    found = layers.conv2d({"weight": weight, "bias": bias}, x, padding=1)
    expected = F.conv2d(x, weight, bias, padding=1)
    assert calls == [1]
    assert (found - expected).norm() <= 5e-6 * expected.norm()
    assert torch.equal(found[1:], layers.conv2d({"weight": weight, "bias": bias}, x[1:], padding=1))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.bfloat16},
        {"memory_format": torch.contiguous_format},
        {"height": 46},
        {"height": 12},
        {"outputs": 3},
        {"stride": 2},
        {"padding": 0},
    ],
    ids=str,
)
def test_other_convolutions_do_not(change):
    weight, _, x = drawn(0, 1, 64, change.get("outputs", 64), change.get("height", 48), 64)
    x = x.contiguous(memory_format=change.get("memory_format", torch.channels_last)).to(change.get("dtype", x.dtype))
    options = {"stride": change.get("stride", 1), "padding": change.get("padding", 1)}
    assert not winograd.fits_conv2d({"weight": weight}, x, **options)


def test_what_is_differentiated_mapped_or_compiled_does_not():
    weight, bias, x = drawn(0, 2, 64, 64, 48, 48)
    params = {"weight": weight, "bias": bias}

    def total(x):
        return layers.conv2d(params, x, padding=1).square().sum()

    expected = torch.func.grad(lambda x: F.conv2d(x, weight, bias, padding=1).square().sum())(x)
    torch.testing.assert_close(torch.func.grad(total)(x), expected)
    torch.testing.assert_close(torch.autograd.grad(total(x.requires_grad_()), x)[0], expected)
    mapped = torch.func.vmap(lambda one: layers.conv2d(params, one[None], padding=1)[0])(x.detach())
    torch.testing.assert_close(mapped, F.conv2d(x, weight, bias, padding=1))
    grads = torch.func.grad(lambda params: layers.conv2d(params, x.detach(), padding=1).square().sum())(params)
    assert grads["weight"].shape == weight.shape


@pytest.mark.parametrize("side", [36, 30], ids=["winograd", "direct"])
@pytest.mark.parametrize("form", ["float", "low rank", "int8"])
def test_an_upsampling_convolution_is_that_of_the_upsampled_image(side, form):
    weight, bias, x = drawn(0, 2, 64, 64, side, side)
    params = {"weight": weight, "bias": bias}
    if form == "int8":
        params = {"weight": (100 * weight).to(torch.int8), "scale": torch.full((64,), 0.01), "bias": bias}
    if form == "low rank":
        params["low_rank"] = {"down": weight[:4], "up": weight[:, :4, 0, 0]}
    twice = F.interpolate(x, scale_factor=2.0)
    before, found = x.clone(), layers.upsample_conv2d(params, x)
    assert torch.equal(x, before)
    torch.testing.assert_close(found, layers.conv2d(params, twice, padding=1), rtol=1e-4, atol=2e-5)


def test_group_norm_of_large_channels_last_pictures_is_as_accurate_as_of_others():
    params = {"weight": prng.normal(prng.key(0), (32,)), "bias": prng.normal(prng.key(1), (32,))}
    x = 1.0 + prng.normal(prng.key(2), (2, 32, 128, 144))
    exact = F.group_norm(x.double(), 8, params["weight"].double(), params["bias"].double(), 1e-6)
    found = layers.group_norm(params, x.contiguous(memory_format=torch.channels_last), 8, 1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - exact).norm() <= 2e-7 * exact.norm()


def test_parameters_alone_can_be_learned_of_large_images():
    weight, bias, x = drawn(0, 1, 64, 64, 96, 96)
    conv, norm = {"weight": weight, "bias": bias}, {"weight": torch.ones(64), "bias": torch.zeros(64)}
    images = x.clone()
    for params, apply in (
        (conv, lambda params: layers.conv2d(params, x, padding=1)),
        (conv, lambda params: layers.upsample_conv2d(params, x)),
        (norm, lambda params: layers.group_norm(params, x, 8, 1e-6)),
        (norm, lambda params: layers.group_norm_silu(params, x, 8, 1e-6)),
    ):
        for name in params:
            own = params[name].clone().requires_grad_()
            learned = params | {name: own}
            (gradient,) = torch.autograd.grad(apply(learned).square().mean(), own)
            total = lambda leaf, name=name, params=params, apply=apply: apply(params | {name: leaf}).square().mean()  # noqa: E731
            torch.testing.assert_close(torch.func.grad(total)(params[name]), gradient)
            assert gradient.norm() > 0 and torch.equal(x, images)
