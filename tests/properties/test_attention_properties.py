"""Properties of joint attention and of the transformer, for any sizes and values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3.core import prng, tree
from functional_sd3.core.attention import Stream, attention, joint_attention
from functional_sd3.transformer import mmdit
from tests import models

IMPLEMENTATIONS = ("sdpa", "math")
FEW = settings(max_examples=25)

sizes = st.integers(1, 5)
seeds = st.integers(0, 2**31)


@st.composite
def streams(draw, least=1, most=3):
    """Streams of any number of tokens, float64, (batch, heads, tokens, head_dim)."""
    batch, heads, width = draw(sizes), draw(sizes), draw(sizes)
    generator = torch.Generator().manual_seed(draw(seeds))
    return [
        Stream(*(torch.randn(batch, heads, tokens, width, generator=generator, dtype=torch.float64) for _ in "qkv"))
        for tokens in draw(st.lists(sizes, min_size=least, max_size=most))
    ]


def close(first, second, tolerance=1e-6):
    return torch.allclose(first, second, rtol=tolerance, atol=tolerance)


def softmax_attention(query, key, value):
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / key.shape[-1] ** 0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdim=True), value)


@FEW
@given(streams(), st.sampled_from(IMPLEMENTATIONS))
def test_joint_attention_equals_softmax_attention_over_the_concatenated_streams(given_streams, implementation):
    attended = torch.cat(joint_attention(given_streams, implementation=implementation), dim=2)
    query, key, value = (torch.cat(parts, dim=2) for parts in zip(*given_streams, strict=True))
    assert close(attended, softmax_attention(query, key, value))


@FEW
@given(streams(), seeds, st.sampled_from(IMPLEMENTATIONS))
def test_permuting_a_streams_tokens_permutes_its_result_and_no_other(given_streams, seed, implementation):
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(stream.key.shape[2], generator=generator) for stream in given_streams]
    paired = zip(given_streams, orders, strict=True)
    permuted = [Stream(*(part[:, :, order] for part in stream)) for stream, order in paired]
    before = joint_attention(given_streams, implementation=implementation)
    after = joint_attention(permuted, implementation=implementation)
    assert all(close(x[:, :, order], y) for x, y, order in zip(before, after, orders, strict=True))


@FEW
@given(streams(), st.data(), st.sampled_from(IMPLEMENTATIONS))
def test_splitting_a_stream_in_two_changes_nothing(given_streams, data, implementation):
    index = data.draw(st.integers(0, len(given_streams) - 1))
    at = data.draw(st.integers(0, given_streams[index].key.shape[2]))
    cut = [part.tensor_split([at], dim=2) for part in given_streams[index]]
    halves = [Stream(*parts) for parts in zip(*cut, strict=True)]
    split = joint_attention(given_streams[:index] + halves + given_streams[index + 1 :], implementation=implementation)
    whole = joint_attention(given_streams, implementation=implementation)
    rejoined = [*split[:index], torch.cat(split[index : index + 2], dim=2), *split[index + 2 :]]
    assert all(close(x, y) for x, y in zip(whole, rejoined, strict=True))


@FEW
@given(streams(), st.data())
def test_a_stream_without_queries_is_attended_to(given_streams, data):
    inactive = data.draw(st.integers(0, len(given_streams) - 1))
    mute = [s._replace(query=None) if i == inactive else s for i, s in enumerate(given_streams)]
    if len(mute) == 1:
        with pytest.raises(ValueError, match="at least one stream with queries"):
            joint_attention(mute)
        return
    full, partial = joint_attention(given_streams), joint_attention(mute)
    assert partial[inactive] is None
    assert all(close(x, y) for i, (x, y) in enumerate(zip(full, partial, strict=True)) if i != inactive)


@FEW
@given(streams(most=1), st.booleans(), st.booleans(), seeds)
def test_sdpa_equals_math_with_masks_of_either_kind(given_streams, boolean, causal, seed):
    (stream,) = given_streams
    tokens = stream.key.shape[2]
    mask = torch.randn(tokens, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if boolean:
        mask = (mask > 0) | torch.eye(tokens, dtype=torch.bool)
    options = {"causal": True} if causal else {"mask": mask}
    fused, plain = (attention(*stream, **options, implementation=name) for name in IMPLEMENTATIONS)
    assert close(fused, plain)


@FEW
@given(streams(), st.floats(-3, 3))
def test_values_all_equal_are_returned_as_they_are(given_streams, constant):
    level = [stream._replace(value=torch.full_like(stream.value, constant)) for stream in given_streams]
    assert all(close(x, torch.full_like(x, constant)) for x in joint_attention(level))


CONFIG = models.transformer_config(depth=3, position_size=6, sample_size=12, qk_norm=True, dual_attention_layers=(0,))


def random_params(seed=0):
    return models.random_leaves(mmdit.spec(CONFIG), seed=seed)


PARAMS = random_params()


@st.composite
def samples(draw, batch=sizes):
    """latents, t, context, pooled of any batch, image size and number of text tokens."""
    generator = torch.Generator().manual_seed(draw(seeds))
    n, height, width, tokens = draw(batch), 2 * draw(st.integers(1, 6)), 2 * draw(st.integers(1, 6)), draw(sizes)
    latents = torch.randn(n, 2, height, width, generator=generator)
    t = torch.rand(n, generator=generator)
    return latents, t, torch.randn(n, tokens, 6, generator=generator), torch.randn(n, 5, generator=generator)


@FEW
@given(samples(), st.data())
def test_a_sample_does_not_depend_on_its_batch(inputs, data):
    index = data.draw(st.integers(0, len(inputs[0]) - 1))
    alone = mmdit.apply(PARAMS, CONFIG, *(part[index : index + 1] for part in inputs))
    assert close(mmdit.apply(PARAMS, CONFIG, *inputs)[index : index + 1], alone, 1e-4)


@FEW
@given(samples(), seeds)
def test_the_order_of_the_context_tokens_does_not_matter(inputs, seed):
    latents, t, context, pooled = inputs
    order = torch.randperm(context.shape[1], generator=torch.Generator().manual_seed(seed))
    shuffled = mmdit.apply(PARAMS, CONFIG, latents, t, context[:, order], pooled)
    assert close(mmdit.apply(PARAMS, CONFIG, *inputs), shuffled, 1e-4)


@FEW
@given(samples(), seeds)
def test_without_positions_permuting_the_patches_permutes_the_velocity(inputs, seed):
    latents, t, context, pooled = inputs
    placeless = {**PARAMS, "position": torch.zeros_like(PARAMS["position"])}
    columns = latents.shape[-1] // 2
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))

    def permuted(x):
        return x.unflatten(-1, (columns, 2))[..., order, :].flatten(-2)

    expected = permuted(mmdit.apply(placeless, CONFIG, *inputs))
    assert close(mmdit.apply(placeless, CONFIG, permuted(latents), t, context, pooled), expected, 1e-4)


@FEW
@given(samples())
def test_apply_changes_neither_its_inputs_nor_the_global_state(inputs):
    before = tree.map(torch.clone, [PARAMS, *inputs])
    generator, dtype = torch.get_rng_state(), torch.get_default_dtype()
    batch, _, height, width = inputs[0].shape
    residuals = [torch.ones(batch, height * width // CONFIG.patch_size**2, CONFIG.width)]
    mmdit.apply(PARAMS, CONFIG, *inputs, residuals=residuals, skip_layers=(1,))
    mmdit.at(mmdit.modulations(PARAMS, CONFIG, inputs[1][None], inputs[3]), 0)
    mmdit.init(prng.key(0), CONFIG)
    assert not tree.diff(before, [PARAMS, *inputs])
    assert torch.equal(generator, torch.get_rng_state()) and dtype == torch.get_default_dtype()
