"""Attention's derivatives in compiled graphs, its operators' contracts, and its memory."""

import pytest
import torch
from torch.func import grad, jvp, vmap

from bench.timing import allocated_peak
from functional_sd3.core import attention, prng, transform
from functional_sd3.core.attention import attention as attend
from functional_sd3.kernels import attention_tiles
from tests.docs import markdown


def random(seed, *shape, dtype=torch.float32):
    return prng.normal(prng.key(seed), shape, dtype)


INPUTS = tuple(random(seed, 2, 2, tokens, 8) for seed, tokens in ((1, 13), (2, 17), (3, 17)))
ALONG = tuple(x.cos() for x in INPUTS)


def loss(q, k, v):
    return (attend(q, k, v).square() * q.sin()).sum()


gradient = grad(loss, argnums=(0, 1, 2))


def tangent(q, k, v):
    return jvp(attend, (q, k, v), ALONG)[1]


def hvp(q, k, v):
    return jvp(gradient, (q, k, v), ALONG)[1]


def two_of_each(f):
    return lambda *x: vmap(f)(*(torch.stack([part, part.cos()]) for part in x))


COMPOSITIONS = {
    "forward": attend,
    "grad": gradient,
    "jvp": tangent,
    "vmap(grad)": two_of_each(gradient),
    "vmap(jvp)": two_of_each(tangent),
    "jvp(grad)": hvp,
    "grad(jvp)": grad(lambda *x: tangent(*x).square().sum(), argnums=(0, 1, 2)),
    "grad(grad)": grad(lambda *x: sum(part.square().sum() for part in gradient(*x)), argnums=(0, 1, 2)),
}


@pytest.mark.parametrize(
    "name, backend", [*((name, "aot_eager") for name in COMPOSITIONS), ("jvp", "inductor"), ("jvp(grad)", "inductor")]
)
def test_a_compiled_composition_is_one_graph_and_equals_the_eager_one(name, backend):
    if backend == "inductor" and not transform.compiler_available():
        pytest.skip("needs a C++ compiler")
    torch._dynamo.reset()
    ours = transform.compile(COMPOSITIONS[name], backend=backend)(*INPUTS)
    torch.testing.assert_close(ours, COMPOSITIONS[name](*INPUTS), rtol=1e-4, atol=1e-5)


def test_a_compiled_attention_has_gradients_by_autograd():
    torch._dynamo.reset()
    leaves = [x.clone().requires_grad_() for x in INPUTS]
    ours = torch.autograd.grad(transform.compile(attend, backend="aot_eager")(*leaves).square().sum(), leaves)
    torch.testing.assert_close(ours, grad(lambda *x: attend(*x).square().sum(), argnums=(0, 1, 2))(*INPUTS))


def test_a_compiled_tangent_takes_other_lengths_without_compiling_again():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = transform.compile(lambda q, k, v: jvp(attend, (q, k, v), (q, k, v))[1], backend=counter, dynamic=True)
    for length in (5, 9, 12):
        inputs = [random(length, 2, 2, length, 8) for _ in range(3)]
        torch.testing.assert_close(compiled(*inputs), jvp(attend, tuple(inputs), tuple(inputs))[1])
    assert counter.frame_count == 1


def transposed(seed, tokens):
    return random(seed, 2, tokens, 2, 8).transpose(1, 2)


@pytest.mark.parametrize("masked", [False, True])
def test_operators_keep_the_contracts_of_pytorch(masked):
    attend(*INPUTS)  # which registers them
    q, k, v, g, o = (transposed(seed, tokens) for seed, tokens in ((1, 5), (2, 7), (3, 7), (4, 5), (5, 5)))
    mask = random(6, 1, 2, 7, 5).transpose(2, 3) if masked else None
    tangents = q.cos(), None, v.cos(), None if mask is None else mask.cos()
    operators = torch.ops.functional_sd3
    # Not of autograd: they are called below it.
    options = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(operators.attention_tangent.default, (q, k, v, mask, o, *tangents, False, 0.3), **options)
    arguments = (g, q, k, v, mask, o, g.cos(), *tangents, False, 0.3, masked)
    torch.library.opcheck(operators.attention_gradients_tangent.default, arguments, **options)
    if masked:
        arguments = (g, q, k, v, mask, o, False, 0.3)
        torch.library.opcheck(operators.attention_mask_gradient.default, arguments, **options)


ORDERS = {
    "jvp": lambda x: jvp(lambda x: attend(x, x, x), (x,), (x,))[1],
    "jvp(grad)": lambda x: jvp(grad(lambda x: attend(x, x, x).square().sum()), (x,), (x,))[1],
    "grad(grad)": grad(lambda x: grad(lambda x: attend(x, x, x).square().sum())(x).sum()),
    "grad(hvp)": grad(lambda x: ORDERS["jvp(grad)"](x).square().sum()),
    "formula in blocks": grad(lambda x: attention.softmax_attention.formula(x, x, x, None, False, 0.3).square().sum()),
}


@pytest.mark.parametrize("name", ORDERS)
def test_memory_is_linear_in_the_tokens(name, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_SCORES", 1 << 14)
    monkeypatch.setattr(attention_tiles, "TILE_SCORES", 1 << 14)
    monkeypatch.setattr(attention, "MIN_ROWS", 16)
    short, long = (
        allocated_peak(lambda tokens=tokens: ORDERS[name](random(1, 1, 1, tokens, 4))) for tokens in (256, 1024)
    )
    assert long <= 4.6 * short


IN_BFLOAT16 = ("grad", "jvp", "jvp(grad)", "grad(grad)")


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_derivatives_in_bfloat16_are_nearer_than_the_formulas(name):
    def derivative(x, implementation):
        f = lambda x: attend(x, x.sin(), x, implementation=implementation)  # noqa: E731
        return {
            "grad": lambda: grad(lambda x: f(x).square().sum())(x),
            "jvp": lambda: jvp(f, (x,), (x,))[1],
            "jvp(grad)": lambda: jvp(grad(lambda x: f(x).square().sum()), (x,), (x,))[1],
            "grad(grad)": lambda: grad(lambda x: grad(lambda x: f(x).square().sum())(x).square().sum())(x),
        }[name]()

    x = random(1, 1, 2, 200, 16).bfloat16()
    exact = derivative(x.double(), "math")
    ours, formula = (derivative(x, implementation).double() for implementation in ("sdpa", "math"))
    assert (ours - exact).norm() <= 1.5e-2 * exact.norm() and (ours - exact).norm() < (formula - exact).norm()


def test_autocast_computes_as_in_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        ours = jvp(attend, INPUTS, ALONG)
    expected = jvp(attend, tuple(x.bfloat16() for x in INPUTS), tuple(x.bfloat16() for x in ALONG))
    assert ours[0].dtype == torch.bfloat16 and torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


def test_the_table_of_the_docs_names_what_compiles_and_what_is_tested_in_bfloat16():
    page = (markdown.ROOT / "docs" / "differentiation.md").read_text(encoding="utf-8")
    rows = markdown.named_rows(page, "order")
    assert sorted(name for _, compiled in rows.values() for name in compiled) == sorted(COMPOSITIONS)
    assert rows["in bfloat16, nearer to float64 than the formula's"][0] == list(IN_BFLOAT16)
