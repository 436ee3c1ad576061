"""`attend=` in all that draws: the same function of streams everywhere, written down or said to be missing."""

import inspect
import json

import pytest
import torch

from functional_sd3 import pipeline
from functional_sd3.core import attention, attention_variants, prng
from functional_sd3.core.attention import Stream
from functional_sd3.pipeline import FlowEdit, InversionEdit, Region, Request, SamplingOptions, StartImages
from functional_sd3.transformer import controlnet, ip_adapter
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt
from tests import models
from tests.models import parts

KEY = prng.key(3)
OPTIONS = {"steps": 1, "cfg": 2.0, "method": "euler", "t5_length": 8}
IMAGES = torch.nn.functional.interpolate(prng.uniform(prng.key(9), (1, 3, 6, 6)), (64, 64), mode="bicubic").clamp(0, 1)
MASK = (torch.arange(64) < 32).float().expand(1, 1, 64, 64)
HEADS, WIDTH, TOKENS = 2, 16, 16
MEMORY = Stream(None, prng.normal(prng.key(1), (1, HEADS, 3, WIDTH)), prng.normal(prng.key(2), (1, HEADS, 3, WIDTH)))


DRAWING = {
    "generate": ("a", KEY),
    "image_to_image": ("a", IMAGES, KEY),
    "inpaint": ("a", IMAGES, MASK, KEY),
    "outpaint": ("a", IMAGES, KEY),
    "regional": ("a", [Region("b", MASK)], KEY),
    "tiled": ("a", KEY),
    "variations": ("a", KEY),
    "interpolate": (["a", "b"], KEY),
    "trajectory": ("a", KEY),
    "edit": ("b", "a", IMAGES),
    "flow_edit": ("b", "a", IMAGES, KEY),
}
OWN_OPTIONS = {
    "outpaint": {"right": 16},
    "tiled": {"height": 64, "width": 80},
    "variations": {"towards": prng.key(5)},
    "interpolate": {"frames": 2},
}


@pytest.mark.parametrize("name", DRAWING)
def test_every_function_that_draws_takes_attention_of_ones_own(model, name):
    called = []

    def counted(streams):
        called.append(len(streams))
        return attention.joint_attention(streams)

    def draw(**options):
        options = {**OPTIONS, **OWN_OPTIONS.get(name, {}), **options}
        return getattr(pipeline, name)(*parts(model), *DRAWING[name], **options)

    plain = draw()
    torch.testing.assert_close(draw(attend={1: counted}), plain, rtol=1e-4, atol=1e-4)
    assert called and set(called) == {2}
    assert not torch.allclose(draw(attend=attention_variants.linear), plain, atol=1e-3)


def test_what_takes_a_block_transform_takes_attend():
    """So that a function that is added later cannot lack it."""
    functions = {name: getattr(pipeline, name) for name in pipeline.__all__ if callable(getattr(pipeline, name))}
    parameters = {name: inspect.signature(function).parameters for name, function in functions.items()}
    taking = {name for name, own in parameters.items() if "block_transform" in own}
    assert taking == {name for name, own in parameters.items() if "attend" in own}
    assert {*DRAWING, "generate_from", "sample", "velocity", "velocities", "SamplingOptions"} <= taking


def written(request):
    return json.loads(json.dumps(pipeline.describe(request), allow_nan=False))


def request(attend):
    return Request("a", KEY, sampling=SamplingOptions(1, 2.0, attend=attend))


def draw(model, request, **options):
    return pipeline.draw(model.params, model.config, pipeline.prepare(*parts(model), request), **options)


@pytest.mark.parametrize(
    "attend",
    [
        attention_variants.windowed((4, 4), 1),
        {0: attention_variants.linear, 2: attention_variants.windowed((4, 4), 0)},
        attention_variants.cached(MEMORY),
        {1: attention.identity_attention},
    ],
    ids=["windowed", "some blocks", "cached", "identity"],
)
def test_forms_of_attention_are_read_back_from_a_description(model, attend):
    again = pipeline.read_description(written(request(attend)))
    assert written(again) == written(request(attend))
    drawn = draw(model, again)
    assert torch.equal(drawn, draw(model, request(attend)))
    assert not torch.allclose(drawn, draw(model, request(None)), atol=1e-3)


def test_a_description_says_that_attention_of_ones_own_is_missing(model):
    def own(streams):
        return attention_variants.linear(streams)

    for attend, path in ((own, "sampling.attend"), ({0: attention_variants.linear, 2: own}, "sampling.attend.2")):
        described = written(request(attend))
        with pytest.raises(
            ValueError, match=rf"{path}: a description does not hold tests.*own, .*give it by this path"
        ):
            pipeline.read_description(described)
        again = pipeline.read_description(described, {path: own})
        assert torch.equal(draw(model, again), draw(model, request(attend)))
    large = Stream(None, torch.zeros(1, HEADS, 64, WIDTH), torch.zeros(1, HEADS, 64, WIDTH))
    described = written(request(attention_variants.cached(large)))
    with pytest.raises(ValueError, match=r"attend.memory.key: .* tensor of 1 x 2 x 64 x 16 numbers .*give it by this"):
        pipeline.read_description(described)


def test_keys_and_values_of_each_prompt_serve_its_rows(model):
    """With guidance a batch has the rows of both prompts; drawn in parts, each image keeps its own memory."""
    memory = Stream(None, *(prng.normal(prng.key(seed), (3, HEADS, 5, WIDTH)) for seed in (1, 2)))
    keys = prng.split(KEY, 3)

    def requested(attend, keys):
        return Request(["a"] * len(keys), keys, sampling=SamplingOptions(1, 2.0, attend={0: attend}))

    whole = draw(model, requested(attention_variants.cached(memory), keys))
    parts_of = draw(model, requested(attention_variants.cached(memory), keys), batch=2)
    torch.testing.assert_close(parts_of, whole, atol=1e-4, rtol=0)
    last = Stream(None, memory.key[2:], memory.value[2:])
    alone = draw(model, requested(attention_variants.cached(last), keys[2:]))
    torch.testing.assert_close(alone, whole[2:], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="keys of 3 rows and 2 heads are given for a batch of 4 rows"):
        draw(model, requested(attention_variants.cached(memory), keys[:2]))


def test_what_is_recorded_in_one_run_is_replayed_in_another(model):
    def generate(prompt, attend=None, **options):
        return pipeline.generate(*parts(model), prompt, KEY, attend=attend, **{**OPTIONS, "steps": 2, **options})

    first, memory = attention.record(lambda attend: generate("a red circle", attend), blocks=[0, 1])
    torch.testing.assert_close(first, generate("a red circle"))
    # Block 0 has a second attention, and each of the two steps evaluates both conditionings at once.
    assert {block: len(kept) for block, kept in memory.items()} == {0: 4, 1: 2}
    assert memory[1][0].query is None and memory[1][0].key.shape == (2, HEADS, TOKENS, WIDTH)
    shared = attention_variants.replay(lambda attend: generate("a blue star", attend), memory)
    assert not torch.allclose(shared, generate("a blue star"), atol=1e-3)
    _, maps = attention.maps(lambda attend: generate("a red circle", attend), blocks=[0, 1])
    again = attention_variants.replay(
        lambda attend: generate("a red circle", attend), maps, use=attention_variants.weighted
    )
    torch.testing.assert_close(again, first, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="4 attentions of block 0 were recorded, and the run calls it more often"):
        attention_variants.replay(lambda attend: generate("a", attend, steps=3), memory)
    with pytest.raises(ValueError, match="4 attentions of block 0 were recorded, and the run called it 2 times"):
        attention_variants.replay(lambda attend: generate("a", attend, steps=1), memory)
    with pytest.raises(ValueError, match="weights of 48 x 48 tokens are given for 50 x 50"):
        attention_variants.replay(
            lambda attend: generate("a", attend, t5_length=10), maps, use=attention_variants.weighted
        )


def controlled(model):
    """Options of a run with a ControlNet and an image prompt."""
    sizes = model.config.transformer
    net = controlnet.Config(
        depth=1, heads=sizes.heads, head_dim=sizes.head_dim, patch_size=sizes.patch_size,
        in_channels=sizes.in_channels, context_width=sizes.context_width, pooled_width=sizes.pooled_width,
        position_size=sizes.position_size, qk_norm=sizes.qk_norm,
    )  # fmt: skip
    adapter = ip_adapter.Config(
        attentions=sizes.depth + len(sizes.dual_attention_layers), width=sizes.width, head_dim=sizes.head_dim,
        image_width=10, hidden_width=24, depth=1, heads=2, resampler_head_dim=8, tokens=5, mlp_width=48,
        time_frequencies=16,
    )  # fmt: skip
    features = prng.normal(prng.key(1), (1, 7, 10))
    return {
        "control": [Control(models.random_leaves(controlnet.spec(net)), net, prng.normal(KEY, (1, 16, 8, 8)))],
        "image_prompt": ImagePrompt(models.random_leaves(ip_adapter.spec(adapter)), adapter, features),
    }


def test_controlnets_and_image_prompts_keep_their_own_attention(model):
    conditions = pipeline.encode(*parts(model), ["a red circle"])
    x, t = prng.normal(prng.key(2), (1, 16, 8, 8)), torch.tensor(0.6)
    lengths = []

    def counted(streams):
        lengths.append([stream.key.shape[2] for stream in streams])
        return attention.joint_attention(streams)

    def velocity(**options):
        return pipeline.velocity(model.params, model.config, conditions, 2.0, **options)(x, t)

    both = controlled(model)
    torch.testing.assert_close(velocity(attend=counted, **both), velocity(**both), rtol=1e-4, atol=1e-4)
    # Each of the transformer's attentions once; those of the ControlNet and of the image prompt are not among them.
    context = conditions.positive.context.shape[1]
    assert lengths == [[TOKENS, context], [TOKENS], [TOKENS, context], [TOKENS, context]]
    for name, value in both.items():
        own = velocity(attend=attention_variants.linear, **{name: value})
        assert not torch.allclose(own, velocity(**{name: value}), atol=1e-3)
        assert not torch.allclose(own, velocity(attend=attention_variants.linear), atol=1e-3)


def test_edits_take_it_in_both_of_their_runs(model):
    called = []

    def counted(streams):
        called.append(len(streams))
        return attention.joint_attention(streams)

    sampling = SamplingOptions(1, 2.0, method="euler", attend={1: counted})
    for edit, evaluations in ((InversionEdit(["b"]), 2), (FlowEdit(["b"], 2.0), 2)):
        called.clear()
        draw(model, Request("a", KEY, sampling=sampling, start=StartImages(IMAGES), edit=edit))
        assert len(called) == evaluations
