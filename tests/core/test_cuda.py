"""What a GPU is given in one kernel is what layers compute in several.

On a CPU the same functions run, of which PyTorch has slower forms there; the questions that keep layers from them,
`has_...`, are answered yes. What only a GPU can show is skipped where there is none.
"""

import pytest
import torch
import torch.nn.functional as F

from functional_sd3.core import cuda, layers, prng, tree

NVIDIA = torch.cuda.is_available() and torch.version.hip is None
DEVICES = ["cpu", *(["cuda"] if NVIDIA else [])]
on_a_gpu = pytest.mark.skipif(not NVIDIA, reason="needs a GPU of Nvidia's")


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        for question in ("has_rms_norm", "has_linear_gelu_tanh", "has_cast"):
            monkeypatch.setattr(cuda, question, lambda *_: True)
    return request.param


def drawn(device, *shape, seed):
    return prng.normal(prng.key(seed), shape).to(device)


def leaves(device):
    return [drawn(device, 3, 2, seed=1), drawn(device, 4, seed=2), drawn(device, 2, 2, seed=3).t()]


def test_many_leaves_change_their_dtype_as_one_by_one(device):
    found = cuda.cast(leaves(device), torch.bfloat16)
    assert all(map(torch.equal, found, [leaf.bfloat16() for leaf in leaves(device)]))


@pytest.mark.parametrize("learned", [(True, True, True), (True, False, True), (False, False, True)])
def test_gradients_of_a_cast_come_back_in_the_dtype_of_the_leaf(device, learned):
    gradients = []
    for cast in (cuda.cast, lambda given, dtype: [leaf.to(dtype) for leaf in given]):
        given = [leaf.requires_grad_(learns) for leaf, learns in zip(leaves(device), learned, strict=True)]
        found = cast(given, torch.bfloat16)
        assert [leaf.requires_grad for leaf in found] == list(learned)
        value = sum((leaf.float() * (1 + index)).square().sum() for index, leaf in enumerate(found))
        gradients.append(torch.autograd.grad(value, [leaf for leaf in given if leaf.requires_grad]))
    assert all(map(torch.equal, *gradients))
    assert all(gradient.dtype == torch.float32 for gradient in gradients[0])


def test_a_leaf_that_nothing_reads_has_no_gradient_and_the_others_have_theirs(device):
    given = [leaf.requires_grad_() for leaf in leaves(device)]
    first, _, third = cuda.cast(given, torch.bfloat16)
    found = torch.autograd.grad(first.sum() + 2 * third.sum(), given, allow_unused=True)
    assert found[1] is None and torch.equal(found[0], torch.ones_like(given[0])) and (found[2] == 2).all()


def test_a_cast_is_differentiated_twice_and_its_backward_pass_mapped(device):
    given = [leaf.double().requires_grad_() for leaf in leaves(device)]
    value = sum(leaf.pow(3).sum() for leaf in cuda.cast(given, torch.float32))
    once = torch.autograd.grad(value, given, create_graph=True)
    twice = torch.autograd.grad(sum(gradient.sum() for gradient in once), given)
    for leaf, gradient in zip(given, twice, strict=True):
        torch.testing.assert_close(gradient, (6 * leaf).detach(), rtol=1e-6, atol=1e-6)
    cast = cuda.cast(given, torch.float32)[0]
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


@pytest.mark.parametrize("activation", layers.ACTIVATIONS)
def test_of_all_activations_only_gelus_tanh_form_goes_inside(activation, monkeypatch):
    asked = []
    monkeypatch.setattr(layers.cpu, "has_linear", lambda *_: False)
    monkeypatch.setattr(cuda, "has_linear_gelu_tanh", lambda *_: True)
    monkeypatch.setattr(cuda, "linear_gelu_tanh", lambda params, x: asked.append(activation))
    layers.linear_activation({"weight": drawn("cpu", 4, 6, seed=1)}, drawn("cpu", 5, 6, seed=2), activation)
    assert asked == ["gelu_tanh"] * (activation == "gelu_tanh")


def test_pytorchs_norm_is_the_formula(device):
    params, x = {"weight": drawn(device, 6, seed=1)}, drawn(device, 2, 3, 6, seed=2).requires_grad_()
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * params["weight"]
    found = layers.rms_norm(params, x, 1e-6)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (found, expected)))


def test_an_average_moves_as_by_lerp(device):
    starts, ends = ([drawn(device, 3, 5, seed=seed), drawn(device, 7, seed=seed + 1)] for seed in (1, 3))
    weight, kept = torch.tensor(0.25, device=device), [end.clone() for end in ends]
    expected = [torch.lerp(start, end, weight) for start, end in zip(starts, ends, strict=True)]
    cuda.lerp_(starts, ends, weight)
    assert all(map(torch.equal, ends, kept))
    for start, found in zip(starts, expected, strict=True):
        torch.testing.assert_close(start, found, rtol=1e-6, atol=1e-7)
    assert cuda.has_lerp(starts, ends, weight) == (device == "cuda")
    for others in ([end.t() for end in ends], ends[:1], [end.double() for end in ends], [ends[1], ends[0]]):
        assert not cuda.has_lerp(starts, others, weight)
    assert not cuda.has_lerp(starts, ends, weight.cpu().double())
    assert not cuda.has_lerp([start.requires_grad_() for start in starts], ends, weight)


@on_a_gpu
def test_a_gpu_draws_the_bits_that_a_cpu_draws_and_nearly_its_gaussians():
    key = prng.key(7)
    here, there = key, key.to("cuda")
    assert cuda.has_kernels(there)
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
def test_a_gpu_is_asked_for_its_kernels_only_where_nothing_watches():
    weight, x = drawn("cuda", 6, seed=1), drawn("cuda", 2, 6, seed=2)
    layer = {"weight": drawn("cuda", 4, 6, seed=3), "bias": drawn("cuda", 4, seed=4)}
    assert cuda.has_rms_norm(x, weight) and cuda.has_linear_gelu_tanh(layer, x) and cuda.has_cast([x, weight])
    assert not cuda.has_rms_norm(x, weight.double()) and not cuda.has_linear_gelu_tanh(layer, x.requires_grad_())
    asked = []
    norm = torch.func.vmap(lambda x: asked.append(cuda.has_rms_norm(x, weight) or cuda.has_cast([x])) or x)
    norm(x.detach()[None])
    assert asked == [False]
