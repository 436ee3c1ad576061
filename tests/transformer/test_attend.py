"""Any block's attention can be replaced and read; a block takes any number of streams; a model can take t - r."""

import dataclasses
from functools import partial

import pytest
import torch
from torch.func import jvp, vmap

from functional_sd3 import pipeline, weights
from functional_sd3.core import attention, attention_variants, prng, transform, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.attention import Stream
from functional_sd3.layouts.components import Config
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import objectives
from functional_sd3.transformer import embeddings, joint_block, mmdit
from tests import models

CONFIG = models.transformer_config(depth=3, position_size=8, sample_size=8, qk_norm=True, dual_attention_layers=(1,))


def random(seed, *shape):
    return prng.normal(prng.key(seed), shape)


def random_params(spec):
    def leaf(path, param):
        seed = int.from_bytes(path.encode()[-7:], "big")
        return 0.2 * random(seed, *param.shape) + (1.0 if "_norm" in path else 0.0)

    return specs.map_params(leaf, spec)


PARAMS = random_params(mmdit.spec(CONFIG))
INPUTS = random(1, 2, 2, 8, 8), torch.tensor([0.3, 0.8]), random(2, 2, 3, 6), random(3, 2, 5)
velocity = partial(mmdit.apply, PARAMS, CONFIG, *INPUTS)


def test_attend_replaces_the_attention_of_every_block_or_of_some():
    called = []

    def counted(streams):
        called.append(len(streams))
        return attention.joint_attention(streams)

    torch.testing.assert_close(velocity(attend=counted), velocity())
    assert called == [2, 2, 1, 2]
    called.clear()
    torch.testing.assert_close(velocity(attend={1: counted}), velocity())
    assert called == [2, 1]
    identity = partial(attention.identity_attention, size=(4, 4))
    assert torch.equal(velocity(attend={2: identity}), velocity(perturbed_layers=(2,)))
    with pytest.raises(ValueError, match="attend \\[3\\] are not among the blocks 0 to 2"):
        velocity(attend={3: counted})


def test_maps_are_the_softmax_weights_of_a_block():
    result, weights = attention.maps(lambda attend: velocity(attend=attend), blocks=(1, 2))
    torch.testing.assert_close(result, velocity())
    (joint, alone), (last,) = weights[1], weights[2]
    assert joint.weights.shape == (2, 2, 19, 19) and alone.weights.shape == (2, 2, 16, 16)
    torch.testing.assert_close(joint.weights.sum(-1), torch.ones(2, 2, 19))
    assert joint.between(0, 1).shape == (2, 2, 16, 3) and joint.between(1, 0).shape == (2, 2, 3, 16)
    assert last.weights.shape == (2, 2, 16, 19)
    with pytest.raises(ValueError, match="stream 1 has no queries"):
        last.between(1, 0)
    streams = [Stream(*(random(seed, 1, 2, n, 4) for seed in (1, 2, 3))) for n in (4, 2)]
    output, kept = attention.maps(lambda attend: attend[0](streams), blocks=[0])
    values = torch.cat([stream.value for stream in streams], dim=2)
    torch.testing.assert_close(kept[0][0].weights @ values, torch.cat(output, dim=2))
    means = attention.maps(lambda attend: velocity(attend=attend), [0], keep=lambda kept: kept.between(0, 1).mean(1))
    assert means[1][0][0].shape == (2, 16, 3)


def test_windowed_attention_sees_its_window_and_the_prompt():
    everything = velocity(attend=attention_variants.windowed((4, 4), radius=4))
    torch.testing.assert_close(everything, velocity())
    assert not torch.allclose(velocity(attend=attention_variants.windowed((4, 4), radius=1)), velocity())
    image = Stream(*(random(seed, 1, 1, 16, 4) for seed in (1, 2, 3)))
    context = Stream(*(random(seed, 1, 1, 3, 4) for seed in (4, 5, 6)))

    def first_token(value, other):
        run = attention_variants.windowed((4, 4), radius=1)
        return run([image._replace(value=value), context._replace(value=other)])[0][0, 0, 0].sum()

    of_image, of_context = torch.func.grad(first_token, argnums=(0, 1))(image.value, context.value)
    seen = of_image[0, 0, :, 0].nonzero().flatten().tolist()
    assert seen == [0, 1, 4, 5] and of_context.all()
    with pytest.raises(ValueError, match="for 3 x 4 tokens, but the image has 16"):
        velocity(attend=attention_variants.windowed((3, 4), radius=1))
    with pytest.raises(ValueError, match="radius -1"):
        attention_variants.windowed((3, 4), radius=-1)


def test_linear_attention_equals_its_weights_written_out():
    streams = [Stream(*(random(seed, 1, 2, n, 4) for seed in (1, 2, 3))) for n in (4, 2)]
    query, key, value = (torch.cat(parts, dim=2) for parts in zip(*streams, strict=True))
    weights = (torch.nn.functional.elu(query) + 1) @ (torch.nn.functional.elu(key) + 1).transpose(-1, -2)
    expected = weights / weights.sum(-1, keepdim=True) @ value
    torch.testing.assert_close(torch.cat(attention_variants.linear(streams), dim=2), expected)
    assert velocity(attend=attention_variants.linear).isfinite().all()


def test_linear_attention_of_many_tokens_does_not_overflow_float16():
    stream = Stream(*(random(seed, 1, 1, 4096, 64) for seed in (1, 2, 3)))
    expected = attention_variants.linear([Stream(*(part.double() for part in stream))])[0]
    (attended,) = attention_variants.linear([Stream(*(part.half() for part in stream))])
    assert attended.dtype == torch.float16
    torch.testing.assert_close(attended.double(), expected, rtol=1e-2, atol=1e-4)


def test_cached_keys_and_values_are_attended_to_beside_the_streams():
    memory = Stream(None, random(7, 1, 2, 5, 8), random(8, 1, 2, 5, 8))
    hidden = memory._replace(key=torch.zeros_like(memory.key), value=torch.zeros_like(memory.value))
    with_memory = velocity(attend={0: attention_variants.cached(memory)})
    assert not torch.allclose(with_memory, velocity(attend={0: attention_variants.cached(hidden)}))
    streams = [Stream(*(random(seed, 2, 2, 4, 8) for seed in (1, 2, 3)))]
    (ours,) = attention_variants.cached(memory)(streams)
    expected = attention.attention(
        streams[0].query,
        torch.cat([streams[0].key, memory.key.expand(2, -1, -1, -1)], dim=2),
        torch.cat([streams[0].value, memory.value.expand(2, -1, -1, -1)], dim=2),
    )
    torch.testing.assert_close(ours, expected)


def test_materialised_parameters_are_those_of_a_block_at_a_time():
    sizes = []

    def materialize(params):
        sizes.append(len(tree.leaves(params)))
        return tree.map(lambda leaf: leaf.to(torch.float32), params)

    half = tree.map(lambda leaf: leaf.to(torch.float64), PARAMS)
    torch.testing.assert_close(mmdit.apply(half, CONFIG, *INPUTS, materialize=materialize), velocity())
    assert len(sizes) == 1 + CONFIG.depth and max(sizes) < len(tree.leaves(PARAMS)) / 2
    rematerialised = velocity(materialize=lambda params: params, block_transform=transform.remat)
    torch.testing.assert_close(rematerialised, velocity())


BLOCK = {
    **PARAMS["blocks"][0],
    "registers": random_params(joint_block.stream_spec(CONFIG.width, CONFIG.head_dim, qk_norm=True)),
}
STREAMS = {"image": random(1, 2, 16, 16), "context": random(2, 2, 3, 16), "registers": random(3, 2, 4, 16)}


def test_a_block_of_three_streams_attends_to_all_of_them():
    condition = random(4, 2, 16)
    three = joint_block.apply(BLOCK, CONFIG.heads, STREAMS, condition)
    assert {name: x.shape for name, x in three.items()} == {name: x.shape for name, x in STREAMS.items()}
    # The order of tokens within a stream and the order of streams do not matter; what other streams hold does.
    turned = joint_block.apply(BLOCK, CONFIG.heads, dict(reversed(STREAMS.items())), condition)
    assert all(torch.allclose(three[name], turned[name], atol=1e-5) for name in STREAMS)
    flipped = joint_block.apply(BLOCK, CONFIG.heads, {**STREAMS, "registers": STREAMS["registers"].flip(1)}, condition)
    torch.testing.assert_close(flipped["registers"].flip(1), three["registers"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flipped["image"], three["image"], rtol=1e-4, atol=1e-5)
    two = joint_block.apply(BLOCK, CONFIG.heads, {name: STREAMS[name] for name in ("image", "context")}, condition)
    assert not torch.allclose(two["image"], three["image"], atol=1e-3)


def test_a_block_makes_its_own_modulations_or_takes_them():
    condition = random(4, 2, 16)
    given = {
        name: torch.nn.functional.linear(condition, part["modulation"]["weight"], part["modulation"]["bias"])
        for name, part in BLOCK.items()
    }
    ours, theirs = (joint_block.apply(BLOCK, CONFIG.heads, STREAMS, one) for one in (condition, given))
    assert not tree.diff(ours, theirs, rtol=1e-5, atol=1e-5)


MEAN = dataclasses.replace(CONFIG, interval_size=8)


def test_a_model_of_mean_velocities_starts_as_the_model_without():
    fresh = mmdit.init(prng.key(0), MEAN)
    assert not fresh["interval"]["out"]["weight"].any()
    params = {**PARAMS, "interval": fresh["interval"]}
    run = partial(mmdit.apply, params, MEAN, *INPUTS)
    assert torch.equal(run(), velocity()) and torch.equal(run(interval=torch.tensor(0.4)), velocity())
    trained = random_params(mmdit.spec(MEAN))
    run = partial(mmdit.apply, trained, MEAN, *INPUTS)
    assert torch.equal(run(), run(interval=torch.zeros(2)))
    assert not torch.allclose(run(interval=torch.tensor([0.3, 0.5])), run(), atol=1e-3)
    latents, t, context, pooled = INPUTS
    rows = mmdit.modulations(trained, MEAN, t, pooled, torch.tensor([0.1, 0.2]))
    given = mmdit.apply(trained, MEAN, latents, None, context, None, modulations=rows)
    torch.testing.assert_close(given, run(interval=torch.tensor([0.1, 0.2])))


@pytest.mark.parametrize(
    ("interval", "config", "message"),
    [
        (torch.tensor(0.1), CONFIG, "its config has no interval_size"),
        (torch.zeros(3), MEAN, r"interval \[3\] must be one number, \(2,\)"),
        (torch.tensor(1), MEAN, "interval"),
    ],
)
def test_an_interval_that_does_not_fit_is_named(interval, config, message):
    with pytest.raises(ValueError, match=message):
        mmdit.apply(random_params(mmdit.spec(config)), config, *INPUTS, interval=interval)


@pytest.mark.parametrize("layout", ["diffusers", "single"])
def test_the_interval_is_saved_in_the_config(tmp_path, layout):
    config = dataclasses.replace(MEAN, sample_size=16)
    params = random_params(mmdit.spec(config))
    path = tmp_path / ("model.safetensors" if layout == "single" else "model")
    weights.save(path, weights.Model({"transformer": params}, Config(transformer=config)), layout=layout)
    loaded = weights.load(path, dtype=torch.float32)
    assert loaded.config.transformer == config
    assert not tree.diff(loaded.params["transformer"], params)


def test_the_smoothed_tangent_is_the_central_difference_and_values_stay():
    latents, t, context, pooled = INPUTS
    h = 0.05

    def condition(t, **options):
        return embeddings.embed_condition(PARAMS, CONFIG.pooled_width, t, pooled, **options)

    smooth = partial(condition, time_difference=h)
    torch.testing.assert_close(smooth(t), condition(t))
    embed = partial(embeddings._embed_time, PARAMS["time"])
    ends = torch.tensor([0.3, 0.98])
    value, slope = jvp(lambda t: embeddings.with_difference(embed, t, h), (ends,), (torch.ones(2),))
    torch.testing.assert_close(value, embed(ends))
    expected = (embed(ends + h).clone()[0] - embed(ends - h)[0]) / (2 * h)
    torch.testing.assert_close(slope[0], expected, rtol=1e-4, atol=1e-4)
    at_the_end = (embed(torch.tensor([1.0])) - embed(torch.tensor([0.93]))) / 0.07
    torch.testing.assert_close(slope[1:], at_the_end, rtol=1e-3, atol=1e-3)

    def run(t, **options):
        return mmdit.apply(PARAMS, CONFIG, latents, t, context, pooled, **options)

    plain, smoothed = (jvp(partial(run, **options), (t,), (t.cos(),)) for options in ({}, {"time_difference": h}))
    torch.testing.assert_close(plain[0], smoothed[0])
    assert not torch.allclose(plain[1], smoothed[1], rtol=1e-2)
    with pytest.raises(ValueError, match="time_difference 0.0 must be above 0"):
        run(t, time_difference=0.0)


def test_tangents_of_the_velocity_are_mapped_and_differentiated_by_default():
    latents, t, context, pooled = INPUTS

    def tangent(x, dx):
        return jvp(lambda x, t: mmdit.apply(PARAMS, CONFIG, x, t, context, pooled), (x, t), (dx, torch.ones_like(t)))[1]

    two = torch.stack([latents.cos(), latents.sin()])
    mapped = vmap(lambda dx: tangent(latents, dx))(two)
    torch.testing.assert_close(mapped, torch.stack([tangent(latents, dx) for dx in two]), rtol=1e-4, atol=1e-5)
    assert torch.func.grad(lambda x: tangent(x, two[0]).square().sum())(latents).isfinite().all()


def test_attend_is_passed_on_by_the_pipeline_and_the_objective():
    config = Config(transformer=CONFIG)
    conditions = pipeline.Conditions(*(Conditioning(INPUTS[2], INPUTS[3]) for _ in range(2)))
    called = []

    def counted(streams):
        called.append(len(streams))
        return attention.joint_attention(streams)

    run = partial(pipeline.velocity, {"transformer": PARAMS}, config, conditions, 2.0)
    torch.testing.assert_close(
        run(attend={0: counted})(INPUTS[0], torch.tensor(0.5)), run()(INPUTS[0], torch.tensor(0.5))
    )
    assert called == [2]
    batch = {"latents": INPUTS[0], "context": INPUTS[2], "pooled": INPUTS[3]}
    objectives.flow_loss(config, attend={2: counted})({"transformer": PARAMS}, batch, prng.split(prng.key(0), 2))
    sample = partial(pipeline.sample, {"transformer": PARAMS}, config, conditions, INPUTS[0], steps=1, method="euler")
    torch.testing.assert_close(sample(attend={2: counted}), sample())
    assert called == [2] * 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda streams: attention.joint_attention(streams)[:1], "returned 1 results; it must return a list of 2"),
        (lambda streams: torch.zeros(2), "returned Tensor; it must return a list of 2"),
        (lambda streams: None, "returned NoneType; it must return a list of 2"),
        (lambda streams: [None, None], "returned NoneType for stream 0, which has queries"),
        (
            lambda streams: [stream.query[:, :, 1:] for stream in streams],
            r"float32 \[2, 2, 15, 8\] on cpu for stream 0",
        ),
        (lambda streams: [stream.query.double() for stream in streams], "float64 .* must return torch.float32"),
        (
            lambda streams: [streams[0].query, streams[1].query[:1]],
            r"\[1, 2, 3, 8\] on cpu for stream 1, .* must return torch.float32 \[2, 2, 3, 8\] \(batch, heads",
        ),
    ],
)
def test_what_is_no_attention_of_the_streams_is_named(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        velocity(attend={0: partial(wrong)})
    assert "attend tests.transformer.test_attend.<lambda>" in str(error.value)


def test_autocast_chooses_the_dtype_of_attention():
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(velocity(attend=attention.joint_attention), velocity(), rtol=2e-2, atol=2e-2)
        assert velocity(attend=attention_variants.linear).isfinite().all()
