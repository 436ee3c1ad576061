"""Attention under every composition of transforms equals the formula under the same."""

import re
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import checkpoint

from functional_sd3.core import attention, prng
from functional_sd3.core.attention import attention as attend
from functional_sd3.kernels import attention_tiles
from tests.docs import markdown

BATCH, HEADS, TOKENS, OTHERS, WIDTH = 2, 3, 13, 17, 8


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Blocks of four rows and tiles of eight, so that every loop here has several steps."""
    monkeypatch.setattr(attention, "MIN_ROWS", 4)
    monkeypatch.setattr(attention, "BLOCK_SCORES", 200)
    monkeypatch.setattr(attention_tiles, "TILE_SCORES", 150)


@pytest.fixture(autouse=True)
def slow_vmap_loops_are_errors():
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def random(seed, *shape, dtype=torch.float64):
    return prng.normal(prng.key(seed), shape, dtype)


Q, K, V = (random(seed, BATCH, HEADS, tokens, WIDTH) for seed, tokens in ((1, TOKENS), (2, OTHERS), (3, OTHERS)))
ALONG = tuple(random(seed, *x.shape) for seed, x in ((4, Q), (5, K), (6, V)))
OTHER = tuple(random(seed, *x.shape) for seed, x in ((7, Q), (8, K), (9, V)))
COTANGENT = random(10, *Q.shape)
PADDING = torch.arange(OTHERS) < torch.tensor([[OTHERS], [9]])
VARIANTS = {
    "no mask": {},
    "boolean mask": {"mask": (random(11, BATCH, 1, TOKENS, OTHERS) > -0.5).index_fill(-1, torch.tensor([0]), True)},
    "key padding": {"mask": PADDING[:, None, None]},
    "additive mask of every head": {"mask": random(12, 1, HEADS, TOKENS, OTHERS)},
    "additive mask": {"mask": random(13, TOKENS, OTHERS)},
    "causal": {"causal": True},
    "scale": {"scale": 0.7},
}


INPUTS = (Q, K, V)
# Three of each input, as mapped dimensions.
STACKS = tuple(torch.stack([x, x.flip(0), x.cos()]) for x in INPUTS)
TANGENT_STACKS = tuple(torch.stack([x, x.flip(1), x.sin()]) for x in ALONG)


def loss(f):
    """A scalar that is not linear in the attention f."""
    return lambda q, k, v: (f(q, k, v).square() * COTANGENT).sum()


def gradient(f):
    return grad(loss(f), argnums=(0, 1, 2))


def tangent(f, along=ALONG):
    return lambda *x: jvp(f, x, along)[1]


def hvp(f):
    return tangent(gradient(f))


def total(fs, weights=OTHER):
    """The scalar of several results."""
    return lambda *x: sum((result * weight).sum() for result, weight in zip(fs(*x), weights, strict=True))


def norm(fs):
    return lambda *x: sum(result.square().sum() for result in fs(*x))


def all_inputs(scalar):
    return grad(scalar, argnums=(0, 1, 2))


def by_autograd(f):
    leaves = [x.clone().requires_grad_() for x in INPUTS]
    return torch.autograd.grad(f(*leaves), leaves, COTANGENT)


def twice_by_autograd(f):
    leaves = [x.clone().requires_grad_() for x in INPUTS]
    cotangent = COTANGENT.clone().requires_grad_()
    gradients = torch.autograd.grad(f(*leaves), leaves, cotangent, create_graph=True)
    return torch.autograd.grad(gradients, [*leaves, cotangent], ALONG)


def by_dual_numbers(f):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, along) for x, along in zip(INPUTS, ALONG, strict=True)]
        return forward_ad.unpack_dual(f(*duals)).tangent


def mapped_cotangents_of_autograd(f):
    leaves = [x.clone().requires_grad_() for x in INPUTS]
    cotangents = torch.stack([COTANGENT, COTANGENT.flip(0)])
    return torch.autograd.grad(f(*leaves), leaves, cotangents, is_grads_batched=True)


def by_checkpoint(f):
    leaves = [x.clone().requires_grad_() for x in INPUTS]
    return torch.autograd.grad(checkpoint(f, *leaves, use_reentrant=False), leaves, COTANGENT)


def jacobian(by):
    """In three numbers, of a few outputs."""

    def few(f):
        return lambda x: f(Q * x[0], K.sin() * x[1], V + x[2])[0, 0, :3]

    return lambda f: by(few(f))(random(14, 3))


def in_dims(q, k, v, out=0):
    """vmap along these dimensions of the stacked inputs; None: of one of them."""

    def of(f):
        dims = (q, k, v)
        inputs = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(STACKS, dims, strict=True)]
        return vmap(f, in_dims=dims, out_dims=out)(*inputs)

    return of


COMPOSITIONS = {
    "forward": lambda f: f(*INPUTS),
    "grad": lambda f: gradient(f)(*INPUTS),
    "vjp": lambda f: vjp(f, *INPUTS)[1](COTANGENT),
    "autograd.grad": by_autograd,
    "autograd.grad twice": twice_by_autograd,
    "jvp": lambda f: jvp(f, INPUTS, ALONG),
    "jvp of q": lambda f: jvp(lambda q: f(q, K, V), (Q,), ALONG[:1]),
    "jvp of v": lambda f: jvp(lambda v: f(Q, K, v), (V,), ALONG[2:]),
    "forward_ad": by_dual_numbers,
    "linearize": lambda f: linearize(f, *INPUTS)[1](*ALONG),
    "jvp(grad)": lambda f: hvp(f)(*INPUTS),
    "grad(jvp)": lambda f: all_inputs(lambda *x: (tangent(f)(*x) * COTANGENT).sum())(*INPUTS),
    "grad(<grad, v>)": lambda f: all_inputs(total(gradient(f)))(*INPUTS),
    "grad(|grad|^2)": lambda f: all_inputs(norm(gradient(f)))(*INPUTS),
    "grad(jvp), the tangent detached": lambda f: all_inputs(
        lambda *x: (f(*x) - tangent(f)(*x).detach()).square().sum()
    )(*INPUTS),
    "jvp(jvp)": lambda f: jvp(tangent(f), INPUTS, OTHER),
    "jvp(jvp) along varying tangents": lambda f: jvp(
        lambda *x: jvp(f, x[:3], x[3:])[1], (*INPUTS, *ALONG), (*OTHER, *INPUTS)
    ),
    "grad(hvp)": lambda f: all_inputs(total(hvp(f)))(*INPUTS),
    "jvp(hvp)": lambda f: jvp(hvp(f), INPUTS, OTHER)[1],
    "grad(grad(grad))": lambda f: all_inputs(norm(all_inputs(norm(gradient(f)))))(*INPUTS),
    "vmap": in_dims(0, -1, 1),
    "vmap of q": in_dims(0, None, None),
    "vmap of k": in_dims(None, -1, None, out=-1),
    "vmap(vmap)": lambda f: vmap(vmap(f, in_dims=(0, None, None)), in_dims=(None, 0, 0))(*STACKS),
    "vmap(grad)": lambda f: vmap(gradient(f))(*STACKS),
    "vmap(grad) of q": lambda f: vmap(gradient(f), in_dims=(0, None, None))(STACKS[0], K, V),
    "vmap(jvp)": lambda f: vmap(tangent(f))(*STACKS),
    "vmap(hvp)": lambda f: vmap(hvp(f))(*STACKS),
    "vmap(jvp) over tangents": lambda f: vmap(lambda *along: jvp(f, INPUTS, along)[1])(*TANGENT_STACKS),
    "vmap(vjp) over cotangents": lambda f: vmap(vjp(f, *INPUTS)[1])(TANGENT_STACKS[0]),
    "grad(vmap)": lambda f: all_inputs(lambda *x: vmap(f)(*x).square().sum())(*STACKS),
    "jvp(vmap)": lambda f: jvp(vmap(f), STACKS, TANGENT_STACKS),
    "jacrev": jacobian(jacrev),
    "jacfwd": jacobian(jacfwd),
    "hessian": jacobian(hessian),
    "is_grads_batched": mapped_cotangents_of_autograd,
    "checkpoint": by_checkpoint,
}


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else [leaf for part in result for leaf in tensors(part)]


def assert_equal(ours, formula, tolerance=1e-13):
    for first, second in zip(tensors(ours), tensors(formula), strict=True):
        assert first.shape == second.shape and first.dtype == second.dtype
        assert (first - second).norm() <= tolerance * second.norm()


# Raised by torch.func.linearize of anything that reads a tensor from outside.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_equals_that_of_the_formula(name, variant):
    ours, formula = (partial(attend, implementation=how, **VARIANTS[variant]) for how in ("sdpa", "math"))
    assert_equal(COMPOSITIONS[name](ours), COMPOSITIONS[name](formula))


MASKS = {name: options["mask"] for name, options in VARIANTS.items() if name.startswith("additive")}
OF_A_MASK = ("grad", "jvp", "hvp", "grad(grad)", "grad(hvp)", "vmap(grad)", "vmap(hvp)", "jvp(grad) of all")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", OF_A_MASK)
def test_a_mask_has_every_derivative(name, mask):
    mask = MASKS[mask]
    along = mask.cos()
    two = torch.stack([mask, mask.sin()])

    def results(how):
        def of_mask(mask):
            return (attend(Q, K, V, mask=mask, implementation=how).square() * COTANGENT).sum()

        def product(mask):
            return jvp(grad(of_mask), (mask,), (along,))[1]

        def with_all(*x):
            return (attend(*x[:3], mask=x[3], implementation=how).square() * COTANGENT).sum()

        inputs = (*INPUTS, mask)
        return {
            "grad": lambda: grad(of_mask)(mask),
            "jvp": lambda: jvp(lambda mask: attend(Q, K, V, mask=mask, implementation=how), (mask,), (along,)),
            "hvp": lambda: product(mask),
            "grad(grad)": lambda: grad(lambda mask: grad(of_mask)(mask).square().sum())(mask),
            "grad(hvp)": lambda: grad(lambda mask: product(mask).square().sum())(mask),
            "vmap(grad)": lambda: vmap(grad(of_mask))(two),
            "vmap(hvp)": lambda: vmap(product)(two),
            "jvp(grad) of all": lambda: jvp(grad(with_all, argnums=(0, 1, 2, 3)), inputs, (*ALONG, along)),
        }[name]()

    assert_equal(results("sdpa"), results("math"))


def test_a_shared_mask_has_a_gradient_for_every_mapped_sample():
    def results(how):
        def of_mask(mask, q):
            return (attend(q, K, V, mask=mask, implementation=how).square() * COTANGENT).sum()

        mask = MASKS["additive mask of every head"]
        return vmap(grad(of_mask), in_dims=(None, 0))(mask, STACKS[0])

    assert_equal(results("sdpa"), results("math"))


@pytest.mark.parametrize("additive", [False, True])
def test_a_row_that_attends_to_nothing_is_zero_with_finite_derivatives_of_every_order(additive):
    mask = torch.ones(TOKENS, OTHERS, dtype=torch.bool)
    mask[3] = mask[8, 2:] = False
    given = torch.zeros(TOKENS, OTHERS, dtype=torch.float64).masked_fill(~mask, -torch.inf) if additive else mask
    ours, formula = (partial(attend, implementation=how, mask=given) for how in ("sdpa", "math"))
    assert not ours(*INPUTS)[:, :, 3].any()
    for name in ("forward", "grad", "jvp", "jvp(grad)", "grad(|grad|^2)", "grad(hvp)", "vmap(hvp)"):
        results = COMPOSITIONS[name](ours)
        assert all(leaf.isfinite().all() for leaf in tensors(results))
        assert_equal(results, COMPOSITIONS[name](formula))


@pytest.mark.parametrize("variant", ["no mask", "causal", "additive mask"])
def test_derivatives_equal_finite_differences(variant):
    inputs = [x[:1, :1, :6, :3].clone().requires_grad_() for x in INPUTS]
    options = {**VARIANTS[variant]}
    if "mask" in options:
        inputs.append(options.pop("mask")[:6, :6].clone().requires_grad_())

    def f(q, k, v, mask=None):
        return attend(q, k, v, mask=mask, **options)

    both = {"check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_batched_forward_grad=True, **both)
    assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True, fast_mode=True)


PAGE = (markdown.ROOT / "docs" / "differentiation.md").read_text(encoding="utf-8")
ORDERS = {
    **dict.fromkeys(("grad", "vjp", "jvp", "jacrev", "jacfwd", "forward_ad", "linearize"), 1),
    **dict.fromkeys(("checkpoint", "is_grads_batched", "twice"), 1),
    **dict.fromkeys(("hvp", "hessian"), 2),
}


def test_the_table_of_the_docs_names_what_is_tested_and_nothing_else():
    rows = {first: names for first, (names, _) in markdown.named_rows(PAGE, "order").items()}
    by_order = {first: names for first, names in rows.items() if first[0].isdigit()}
    assert sorted(name for names in by_order.values() for name in names) == sorted(COMPOSITIONS)
    assert rows["of an additive mask"] == list(OF_A_MASK)
    # The order of a composition is counted from its name: a transform each time that it occurs.
    for first, names in by_order.items():
        for name in names:
            words = re.findall(r"[a-z_]+", name.replace("autograd.", ""))
            assert sum(ORDERS.get(word, 0) for word in words) == int(first[0]), name
    variants = PAGE.split("each in these variants: ")[1].split(".")[0]
    assert [name.strip() for name in variants.split(",")] == list(VARIANTS)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scores", [1, 150, 500, 1 << 19], ids="tiles of {} scores".format)
def test_tiles_of_any_size_cover_each_visible_score_once(scores, causal, monkeypatch):
    monkeypatch.setattr(attention_tiles, "TILE_SCORES", scores)
    covered = torch.zeros(BATCH * HEADS, TOKENS, OTHERS, dtype=torch.int64)
    for part in attention_tiles.Tiles(Q, K, V, None, causal, 1.0):
        assert covered[tuple(part)].numel() <= max(scores, attention.MIN_ROWS * OTHERS)
        covered[tuple(part)] += 1
    visible = torch.ones(TOKENS, OTHERS, dtype=torch.bool).tril() if causal else torch.tensor(True)
    assert (covered[:, visible.expand(TOKENS, OTHERS)] == 1).all() and covered.max() == 1
    ours, formula = (partial(attend, causal=causal, implementation=how) for how in ("sdpa", "math"))
    for name in ("jvp", "jvp(grad)"):
        assert_equal(COMPOSITIONS[name](ours), COMPOSITIONS[name](formula))
