"""Kernels of GPUs beyond what `test_table` shows of all: gradients of casts, and bits on the device itself.

The casts run on a CPU too, of which PyTorch has slower forms there; what only a GPU can show is skipped elsewhere.
"""

import ctypes
import os
import subprocess

import pytest
import torch
import torch.nn.functional as F

from functional_sd3 import kernels
from functional_sd3.core import dispatch, layers, prng, tree
from functional_sd3.core.transform import compiler_available
from functional_sd3.kernels import cuda

NVIDIA = torch.cuda.is_available() and torch.version.hip is None
DEVICES = ["cpu", *(["cuda"] if NVIDIA else [])]
on_a_gpu = pytest.mark.skipif(not NVIDIA, reason="needs a GPU of Nvidia's")


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        for operation in ("layers.cast_leaves", "layers.rms_norm"):
            kernel = next(each for each in kernels.TABLE[operation] if each.name.startswith("cuda."))
            monkeypatch.setitem(kernels.TABLE, operation, (kernel._replace(fits=lambda *_: True),))
    return request.param


def drawn(device, *shape, seed):
    return prng.normal(prng.key(seed), shape).to(device)


def leaves(device):
    return [drawn(device, 3, 2, seed=1), drawn(device, 4, seed=2), drawn(device, 2, 2, seed=3).t()]


def test_many_leaves_change_their_dtype_as_one_by_one(device):
    found = cuda.cast_leaves(leaves(device), torch.bfloat16)
    assert all(map(torch.equal, found, [leaf.bfloat16() for leaf in leaves(device)]))


@pytest.mark.parametrize("learned", [(True, True, True), (True, False, True), (False, False, True)])
def test_gradients_of_a_cast_come_back_in_the_dtype_of_the_leaf(device, learned):
    gradients = []
    for cast in (cuda.cast_leaves, lambda given, dtype: [leaf.to(dtype) for leaf in given]):
        given = [leaf.requires_grad_(learns) for leaf, learns in zip(leaves(device), learned, strict=True)]
        found = cast(given, torch.bfloat16)
        assert [leaf.requires_grad for leaf in found] == list(learned)
        value = sum((leaf.float() * (1 + index)).square().sum() for index, leaf in enumerate(found))
        gradients.append(torch.autograd.grad(value, [leaf for leaf in given if leaf.requires_grad]))
    assert all(map(torch.equal, *gradients))
    assert all(gradient.dtype == torch.float32 for gradient in gradients[0])


def test_a_leaf_that_nothing_reads_has_no_gradient_and_the_others_have_theirs(device):
    given = [leaf.requires_grad_() for leaf in leaves(device)]
    first, _, third = cuda.cast_leaves(given, torch.bfloat16)
    found = torch.autograd.grad(first.sum() + 2 * third.sum(), given, allow_unused=True)
    assert found[1] is None and torch.equal(found[0], torch.ones_like(given[0])) and (found[2] == 2).all()


def test_a_cast_is_differentiated_twice_and_its_backward_pass_mapped(device):
    given = [leaf.double().requires_grad_() for leaf in leaves(device)]
    value = sum(leaf.pow(3).sum() for leaf in cuda.cast_leaves(given, torch.float32))
    once = torch.autograd.grad(value, given, create_graph=True)
    twice = torch.autograd.grad(sum(gradient.sum() for gradient in once), given)
    for leaf, gradient in zip(given, twice, strict=True):
        torch.testing.assert_close(gradient, (6 * leaf).detach(), rtol=1e-6, atol=1e-6)
    cast = cuda.cast_leaves(given, torch.float32)[0]
    rows = torch.eye(6, device=device).reshape(6, 3, 2)
    (mapped,) = torch.autograd.grad(cast, given[:1], rows, is_grads_batched=True)
    assert torch.equal(mapped, rows.double())


def test_a_model_is_cast_but_for_its_integers_and_what_has_the_dtype(device):
    same, counter = drawn(device, 2, seed=1).bfloat16(), torch.arange(3, device=device)
    model = {"a": drawn(device, 2, 3, seed=2), "b": [same, counter], "c": {"d": drawn(device, 4, seed=3)}}
    found = layers.cast(model, torch.bfloat16)
    assert tree.allclose(found, tree.cast(model, torch.bfloat16), rtol=0, atol=0)
    assert found["b"][0] is same and found["b"][1] is counter


@on_a_gpu
@pytest.mark.parametrize("rows, inputs, outputs", [(5, 6, 4), (64, 64, 256), (1000, 384, 1536)])
def test_gelu_inside_the_product_is_its_tanh_form(rows, inputs, outputs):
    params = {"weight": drawn("cuda", outputs, inputs, seed=1), "bias": drawn("cuda", outputs, seed=2)}
    x = drawn("cuda", 2, rows, inputs, seed=3) / inputs**0.5
    expected = F.gelu(F.linear(x, **params), approximate="tanh")
    torch.testing.assert_close(layers.linear_activation(params, x, "gelu_tanh"), expected, rtol=1e-5, atol=1e-5)


def test_pytorchs_norm_is_the_formula(device):
    params, x = {"weight": drawn(device, 6, seed=1)}, drawn(device, 2, 3, 6, seed=2).requires_grad_()
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * params["weight"]
    found = layers.rms_norm(params, x, 1e-6)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (found, expected)))


@on_a_gpu
def test_a_gpu_draws_the_bits_that_a_cpu_draws_and_nearly_its_gaussians():
    key = prng.key(7)
    here, there = key, key.to("cuda")
    assert cuda.fits_threefry(*there.to(torch.int32), torch.arange(3, dtype=torch.int32, device="cuda"))
    draws = (
        lambda key: prng.bits(key, (1000, 33)),
        lambda key: prng.split(key, (3, 5)),
        lambda key: prng.fold_in(key, 5),
        lambda key: prng.fold_in(key, torch.arange(9, device=key.device)),
        lambda key: prng.uniform(key, 100, torch.float64),
        lambda key: torch.func.vmap(lambda own: prng.bits(own, 4))(prng.split(key, 3)),
    )
    for draw in draws:
        assert torch.equal(draw(there).cpu(), draw(here))
    torch.testing.assert_close(prng.normal(there, 1 << 20).cpu(), prng.normal(here, 1 << 20), rtol=1e-5, atol=1e-6)


@on_a_gpu
def test_a_gpu_is_given_its_kernels_only_where_nothing_tracks():
    x, layer = drawn("cuda", 2, 6, seed=2), {"weight": drawn("cuda", 4, 6, seed=3), "bias": drawn("cuda", 4, seed=4)}
    norm = {"weight": drawn("cuda", 6, seed=1)}
    assert cuda.fits_rms_norm(norm, x, 1e-6) and cuda.fits_linear_activation(layer, x, "gelu_tanh")
    assert not cuda.fits_rms_norm({"weight": norm["weight"].double()}, x, 1e-6)
    assert dispatch.tracking(x) == "none" and dispatch.tracking(x.clone().requires_grad_()) == "autograd"
    states = []
    torch.func.vmap(lambda x: states.append(dispatch.tracking(x)) or x)(x)
    assert states == ["other"]


def units_in_last_place(ours, theirs):
    """Differences of float32 numbers in units of the last place of `theirs`."""
    exponents = torch.frexp(theirs).exponent
    return (ours - theirs).abs() / torch.ldexp(torch.ones_like(theirs), exponents - 24)


@pytest.mark.skipif(not compiler_available(), reason="needs a C++ compiler")
def test_what_a_gpu_computes_in_one_kernel_is_what_tensors_compute(tmp_path):
    # The lines of C++ that torch.cuda.jiterator is given, built by the machine's own compiler.
    source = f"""
    #include <cmath>
    #include <cstdint>
    inline float __fmul_rn(float a, float b) {{ return a * b; }}
    inline float __fadd_rn(float a, float b) {{ return a + b; }}
    {cuda._threefry_source()} {cuda._gaussian_source()}
    extern "C" void ciphers(int n, int32_t* a, int32_t* b, int32_t* c, int32_t* x, int32_t* y) {{
        for (int i = 0; i < n; i++) threefry<int32_t>(a[i], b[i], c[i], x[i], y[i]); }}
    extern "C" void normals(int n, float* u, float* x) {{ for (int i = 0; i < n; i++) normal<float>(u[i], x[i]); }}
    """
    (tmp_path / "kernels.cpp").write_text(source)
    built = tmp_path / "kernels.so"
    options = ["-O1", "-ffp-contract=off", "-shared", "-fPIC", "-o", str(built)]
    subprocess.run([os.environ.get("CXX", "g++"), *options, str(tmp_path / "kernels.cpp")], check=True)
    library = ctypes.CDLL(str(built))

    def call(name, *tensors):
        getattr(library, name)(tensors[0].numel(), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors))

    words = prng.bits(prng.key(5), (3, 1000)).to(torch.int32).unbind()
    found = torch.empty(1000, dtype=torch.int32), torch.empty(1000, dtype=torch.int32)
    call("ciphers", *words, *found)
    assert all(map(torch.equal, found, prng.threefry(*words)))
    draw = torch.cat([prng.uniform(prng.key(6), (10_000,)), torch.tensor([0.0, 1 - 2.0**-23, 0.5])])
    gaussian = torch.empty_like(draw)
    call("normals", draw, gaussian)
    assert units_in_last_place(gaussian, prng.gaussian(draw)).max() <= 4  # their logarithms are of two libraries
