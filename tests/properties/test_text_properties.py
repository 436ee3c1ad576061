"""Properties of the text encoders as functions: purity, independence, causality, and every transform of torch.func."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vjp, vmap

from functional_sd3.core import prng, tree
from functional_sd3.text import clip, conditioning, t5

# torch's forward-mode rules and compiler are made with torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

CLIP = clip.Config(vocab=40, length=8, width=12, layers=2, heads=2, mlp_width=16, projection_width=10, eos_id=39)
T5 = t5.Config(vocab=40, width=24, layers=2, heads=3, head_dim=4, mlp_width=20, buckets=8, max_distance=12)
BOTH = SimpleNamespace(clip_l=CLIP, clip_g=CLIP, t5=T5, transformer=SimpleNamespace(context_width=24, pooled_width=20))
PARAMS = {
    "clip_l": clip.init(prng.key(0), CLIP),
    "clip_g": clip.init(prng.key(1), CLIP),
    "t5": t5.init(prng.key(2), T5),
}

# Each encoder as a function of (params, ids, implementation) whose value is one tensor for each text.
ENCODERS = {
    "clip": (
        PARAMS["clip_l"],
        lambda params, ids, how: torch.cat(
            [part.flatten(1) for part in clip.apply(params, CLIP, ids, implementation=how)], dim=1
        ),
    ),
    "t5": (PARAMS["t5"], lambda params, ids, how: t5.apply(params, T5, ids, implementation=how).flatten(1)),
    "conditioning": (
        PARAMS,
        lambda params, ids, how: torch.cat(
            [
                part.flatten(1)
                for part in conditioning.encode(params, BOTH, conditioning.Ids(ids, ids, ids), implementation=how)
            ],
            dim=1,
        ),
    ),
}
every_encoder = pytest.mark.parametrize("name", ENCODERS)
seeds = st.integers(0, 2**31 - 1)


def random_ids(seed: int, batch: int = 4, tokens: int = 8):
    return prng.randint(prng.key(seed), (batch, tokens), 0, 40)


def like(seed: int, params):
    """A tree of normal noise shaped like `params`."""
    leaves = tree.leaves(params)
    keys = prng.split(prng.key(seed), len(leaves))
    noise = iter([prng.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])
    return tree.map(lambda _: next(noise), params)


def dot(first, second) -> torch.Tensor:
    return sum((a * b).sum() for a, b in zip(tree.leaves(first), tree.leaves(second), strict=True))


@pytest.fixture
def no_slow_vmap():
    """A batching rule that is missing is an error, not a loop."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


@every_encoder
def test_encoding_changes_neither_its_inputs_nor_any_global_state(name):
    params, encode = ENCODERS[name]
    ids = random_ids(0)
    before = tree.map(torch.clone, params), ids.clone(), torch.get_rng_state(), torch.get_default_dtype()
    first, second = encode(params, ids, "sdpa"), encode(params, ids, "sdpa")
    assert torch.equal(first, second)
    assert tree.diff(params, before[0]) == [] and torch.equal(ids, before[1])
    assert torch.equal(torch.get_rng_state(), before[2]) and torch.get_default_dtype() == before[3]


@every_encoder
@given(seed=seeds, batch=st.integers(1, 5), tokens=st.integers(1, 8))
@settings(max_examples=20)
def test_a_text_is_encoded_alike_in_any_batch(name, seed, batch, tokens):
    params, encode = ENCODERS[name]
    ids = random_ids(seed, batch, tokens)
    together = encode(params, ids, "sdpa")
    alone = torch.cat([encode(params, row[None], "sdpa") for row in ids])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@given(seed=seeds, position=st.integers(1, 7))
@settings(max_examples=20)
def test_clip_never_looks_ahead(seed, position):
    ids = random_ids(seed)
    changed = torch.cat((ids[:, :position], random_ids(seed + 1)[:, position:]), dim=1)
    params = PARAMS["clip_l"]
    before, after = clip.apply(params, CLIP, ids), clip.apply(params, CLIP, changed)
    torch.testing.assert_close(before.last[:, :position], after.last[:, :position])
    torch.testing.assert_close(before.penultimate[:, :position], after.penultimate[:, :position])
    shortened = clip.apply(params, CLIP, ids[:, :position])
    torch.testing.assert_close(shortened.last, before.last[:, :position])


@given(seed=seeds, lengths=st.lists(st.integers(1, 8), min_size=4, max_size=4))
@settings(max_examples=20)
def test_masked_tokens_do_not_change_t5s_output(seed, lengths):
    mask = torch.arange(8)[None] < torch.tensor(lengths)[:, None]
    ids = random_ids(seed)
    changed = torch.where(mask, ids, random_ids(seed + 1))
    before, after = (t5.apply(PARAMS["t5"], T5, each, mask=mask) for each in (ids, changed))
    torch.testing.assert_close(before[mask], after[mask])


def test_t5_looks_ahead_and_at_padding_without_a_mask():
    ids = random_ids(3)
    changed = torch.cat((ids[:, :7], (ids[:, 7:] + 1) % 40), dim=1)
    before, after = (t5.apply(PARAMS["t5"], T5, each) for each in (ids, changed))
    assert (before - after)[:, :7].abs().amax(dim=(1, 2)).min() > 1e-4


@every_encoder
def test_forward_and_reverse_mode_agree(name):
    """<v, J u> = <J^T v, u>, and J u is the slope along u."""
    params, encode = ENCODERS[name]
    # float64 parameters; norms and softmax keep float32 statistics, so the slope is good to about 1e-4.
    params, ids = tree.cast(params, torch.float64), random_ids(4)
    direction = tree.cast(like(5, params), torch.float64)
    value, slope = jvp(lambda tree: encode(tree, ids, "math"), (params,), (direction,))
    _, pull = vjp(lambda tree: encode(tree, ids, "math"), params)
    cotangent = prng.normal(prng.key(6), value.shape, dtype=torch.float64)
    torch.testing.assert_close(dot(cotangent, slope), dot(pull(cotangent)[0], direction), rtol=1e-4, atol=1e-4)
    step = 5e-5
    ahead, behind = (
        encode(tree.map(lambda p, d, s=sign: p + s * step * d, params, direction), ids, "math") for sign in (1, -1)
    )
    assert float(((ahead - behind) / (2 * step) - slope).norm() / slope.norm()) < 1e-3


@every_encoder
def test_reverse_mode_is_the_same_through_both_attentions(name):
    params, encode = ENCODERS[name]
    ids = random_ids(7)
    weight = prng.normal(prng.key(8), encode(params, ids, "sdpa").shape)
    fused, exact = (
        grad(lambda tree, how=how: (weight * encode(tree, ids, how)).mean())(params) for how in ("sdpa", "math")
    )
    assert tree.allclose(fused, exact, rtol=1e-4, atol=1e-5)


@every_encoder
def test_torch_autograd_equals_torch_func(name):
    params, encode = ENCODERS[name]
    ids = random_ids(9)
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
    loss = encode(leaves, ids, "sdpa").sin().mean()
    actual = torch.autograd.grad(loss, tree.leaves(leaves), allow_unused=True, materialize_grads=True)
    expected = grad(lambda tree: encode(tree, ids, "sdpa").sin().mean())(params)
    for ours, theirs in zip(actual, tree.leaves(expected), strict=True):
        torch.testing.assert_close(ours, theirs)


@every_encoder
def test_vmap_over_texts_equals_the_batch(name, no_slow_vmap):
    params, encode = ENCODERS[name]
    ids = random_ids(10)
    mapped = vmap(lambda row: encode(params, row[None], "math")[0])(ids)
    torch.testing.assert_close(mapped, encode(params, ids, "math"), rtol=1e-5, atol=1e-5)


@every_encoder
def test_vmap_over_parameters_equals_each_alone(name, no_slow_vmap):
    params, encode = ENCODERS[name]
    ids = random_ids(11)
    other = tree.map(lambda leaf, noise: leaf + 0.1 * noise, params, like(12, params))
    stacked = tree.map(lambda *leaves: torch.stack(leaves), params, other)
    mapped = vmap(lambda tree: encode(tree, ids, "math"))(stacked)
    torch.testing.assert_close(mapped[0], encode(params, ids, "math"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mapped[1], encode(other, ids, "math"), rtol=1e-4, atol=1e-4)


@every_encoder
def test_vmap_of_grad_gives_every_texts_own_gradient(name, no_slow_vmap):
    params, encode = ENCODERS[name]
    ids = random_ids(13)

    def loss(params, row):
        return encode(params, row[None], "math").sin().mean()

    together = vmap(grad(loss), in_dims=(None, 0))(params, ids)
    for index, row in enumerate(ids):
        assert tree.allclose(tree.map(lambda leaf, i=index: leaf[i], together), grad(loss)(params, row), atol=1e-6)


@every_encoder
def test_compiled_whole_values_and_gradients_equal_eager(name):
    params, encode = ENCODERS[name]
    ids = random_ids(14)

    def loss(params):
        return encode(params, ids, "sdpa").sin().mean()

    exact_slopes, exact = torch.func.grad_and_value(loss)(params)
    torch._dynamo.reset()
    # What all of them are together is traced only: its kernels are those of each.
    if name != "conditioning":
        torch.testing.assert_close(torch.compile(loss, fullgraph=True)(params), exact)
    # Traced and differentiated as for any backend, without the minutes that kernels take to build.
    compiled = torch.compile(torch.func.grad_and_value(loss), backend="aot_eager", fullgraph=True)
    slopes, value = compiled(params)
    torch.testing.assert_close(value, exact)
    assert tree.allclose(slopes, exact_slopes, rtol=1e-3, atol=1e-6)
