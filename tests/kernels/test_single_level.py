"""Functions under transforms, by a class of one level that is made once, equal those by PyTorch's general rule."""

import pytest
import torch
from torch.func import grad, jvp, vjp, vmap

from functional_sd3.core import layers, prng
from functional_sd3.core.attention import attention
from functional_sd3.kernels import single_level

X = prng.normal(prng.key(1), (2, 3, 9, 8), torch.float64)
ONE = torch.ones((), dtype=torch.float64)


def nestings(implementation):
    def squares(x):
        return attention(x, x.cos(), x, implementation=implementation).square().sum()

    def pullback(x):
        return lambda g: vjp(squares, x)[1](g)[0].square().sum()

    def of_leaves():
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(squares(x), x, create_graph=True)
        return torch.autograd.grad(grad(squares)(x).square().sum() + gradient.square().sum(), x)[0]

    return {
        "grad": grad(squares)(X),
        "grad(grad)": grad(lambda x: grad(squares)(x).square().sum())(X),
        "jvp(grad)": jvp(grad(squares), (X,), (X.sin(),))[1],
        "jvp(jvp)": jvp(lambda x: jvp(squares, (x,), (X,))[1], (X,), (X.sin(),))[1],
        "grad(vmap(grad))": grad(lambda x: vmap(grad(squares))(torch.stack([x, -x])).square().sum())(X),
        "grad in the cotangent": grad(pullback(X))(ONE),
        "vmap in the cotangent": vmap(pullback(X))(torch.stack([ONE, 2 * ONE])),
        "autograd of grad": of_leaves(),
    }


@pytest.mark.parametrize("complete", [True, False], ids=["single level", "general rule"])
def test_derivatives_equal_the_formulas(complete, monkeypatch):
    assert single_level._is_complete and single_level._is_correct()
    monkeypatch.setattr(single_level, "_is_complete", complete)
    for name, expected in nestings("math").items():
        torch.testing.assert_close(nestings("sdpa")[name], expected, rtol=1e-12, atol=1e-12, msg=name)


def test_a_class_is_made_once_for_a_function():
    run = grad(lambda x: attention(x, x, x).sum())
    run(X)
    levels = single_level._SingleLevelFunction
    before = set(levels.__subclasses__())
    run(X)
    assert set(levels.__subclasses__()) == before


def test_a_changed_pytorch_is_noticed(monkeypatch):
    single_level._is_correct_under_transforms.cached.cache_clear()
    monkeypatch.setattr(single_level, "_set_allowed", lambda allowed: None)
    assert not single_level._is_correct()
    monkeypatch.undo()
    single_level._is_correct_under_transforms.cached.cache_clear()
    assert single_level._is_correct()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_tangent_has_a_graph_only_where_gradients_are_on(wanted):
    assert single_level._is_correct()
    weight, bias = prng.normal(prng.key(0), (4, 4)).requires_grad_(), torch.zeros(4, requires_grad=True)
    x = prng.normal(prng.key(1), (3, 4))
    run = lambda x: torch.nn.functional.normalize(layers.linear({"weight": weight, "bias": bias}, x))  # noqa: E731
    saved = []
    with torch.set_grad_enabled(wanted), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        value, tangent = jvp(run, (x,), (x.cos(),))
        nested = jvp(lambda x: jvp(run, (x,), (x.cos(),))[1], (x,), (x.sin(),))[1]
    assert value.requires_grad == tangent.requires_grad == nested.requires_grad == wanted
    assert bool(saved) == wanted


def test_a_first_call_within_a_dual_level_says_nothing_of_later_ones():
    """PyTorch refuses a jvp there."""
    single_level._is_correct_under_transforms.cached.cache_clear()
    with torch.autograd.forward_ad.dual_level():
        assert single_level._is_correct()
    assert not single_level._is_correct_under_transforms.cached.cache_info().currsize
    assert single_level._is_correct()
