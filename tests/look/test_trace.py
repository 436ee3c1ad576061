"""`look.trace`: the image of `generate` to the bit, and what it passed through, for every kind of run."""

from dataclasses import replace

import pytest
import torch

from functional_sd3 import look, pipeline, weights
from functional_sd3.core import prng
from functional_sd3.flow import guidance, ode, path
from functional_sd3.look import tokens
from functional_sd3.look.trace import evenly
from functional_sd3.pipeline import Region, Request, SamplingOptions, StartImages, TextOptions, Tiling
from functional_sd3.text import bpe, unigram
from functional_sd3.text.tokenization import tokenize_prompts
from functional_sd3.weights import shipped
from tests.models import parts

KEY = prng.key(3)
OPTIONS = {"steps": 3, "t5_length": 8, "height": 64, "width": 80}
IMAGES = prng.uniform(prng.key(9), (1, 3, 64, 80))
MASK = (torch.arange(80) < 40).float().expand(1, 1, 64, 80)


RUNS = {
    "plain": {},
    "unguided": {"cfg": 1.0},
    "heun": {"method": "heun"},
    "multistep": {"method": "dpmpp_2m", "negative": "blue"},
    "stochastic": {"method": "euler_ancestral"},
    "adaptive": {"method": ode.BOSH3._replace(rtol=0.1, atol=0.1)},
    "in a window": {"guidance": guidance.interval(guidance.zero_star(4.0), 0.3, 1.0)},
    "with a carry": {"guidance": guidance.apg(4.0)},
    "skip-layer": {"guidance": guidance.skip_layer(guidance.cfg(4.0), (1,))},
    "cache": {"cache": "extrapolate:every=2", "steps": 6},
    "without a block": {"skip_layers": (1,)},
    "weighted": {"weighted": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_image_is_that_of_generate_to_the_bit(model, name):
    options = OPTIONS | RUNS[name]
    few = {"attention_steps": 2, "image_steps": 1}
    record = look.trace(*parts(model), "a (large:1.2) red circle", KEY, **options, **few)
    assert torch.equal(record.image, pipeline.generate(*parts(model), "a (large:1.2) red circle", KEY, **options)[0])
    steps = options["steps"]
    assert len(record.states) == len(record.times) == steps + 1 and len(record.step_seconds) == steps
    again = path.denoised(record.states[:-1], record.velocities, record.times[:-1])
    torch.testing.assert_close(again, record.denoised, rtol=1e-4, atol=1e-4)
    assert record.evaluations and all(torch.isfinite(each.guided) for each in record.evaluations)
    assert torch.equal(record.states[0], pipeline.initial_noise(KEY, model.config, 1, 64, 80)[0])
    latents = pipeline.decode(model.params, model.config, record.states[-1:])
    assert torch.equal(latents[0], record.image)
    depth = model.config.transformer.depth
    assert record.attention.to_words.shape[:2] == (2, depth - len(options.get("skip_layers", ())))
    sums = record.attention.to_words.sum(2) + record.attention.image
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-5, atol=1e-5)


def test_norms_are_those_of_the_velocities(model):
    record = look.trace(*parts(model), "a red circle", KEY, **OPTIONS, cfg=3.0)
    first = record.evaluations[0]
    assert [each.step for each in record.evaluations] == [0, 1, 2] and set(first.norms) == {"positive", "negative"}
    torch.testing.assert_close(first.guided, record.velocities[0].square().mean().sqrt(), rtol=1e-4, atol=0)
    unguided = look.trace(*parts(model), "a red circle", KEY, **OPTIONS, cfg=1.0)
    torch.testing.assert_close(unguided.evaluations[0].norms["positive"], first.norms["positive"], rtol=1e-5, atol=0)
    assert not any(each.change for each in unguided.evaluations) and first.change > 0


START = {"image to image": StartImages(IMAGES, 0.7), "mask": StartImages(IMAGES, 1.0, MASK, restore=True)}
REQUESTS = {
    **{name: {"start": start} for name, start in START.items()},
    "regions": {"regions": (Region("a blue star", MASK),)},
    "tiles": {"tiling": Tiling(64, 16)},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_of_every_kind_are_drawn_as_the_pipeline_draws_them(model, name):
    params, config, tables = parts(model)
    run, text = SamplingOptions(4), TextOptions(t5_length=8)
    request = Request("a red circle", KEY, text, run, **{"height": 64, "width": 80, **REQUESTS[name]})
    record = look.trace_request(params.__getitem__, config, tables, request)
    prepared = pipeline.prepare(params, config, tables, request)
    assert torch.equal(record.image, pipeline.draw(params, config, prepared)[0])
    assert (record.attention is None) == (name == "tiles")
    assert bool(record.notes) == (name in ("tiles", "regions"))


@pytest.mark.parametrize("absent", [("t5",), ("clip_l", "clip_g"), ("clip_l",)], ids=",".join)
@pytest.mark.filterwarnings("ignore::functional_sd3.formats.notes.Note")
def test_encoders_may_be_absent(model, absent):
    params = {name: value for name, value in model.params.items() if name not in absent}
    record = look.trace(params, model.config, model.tokenizers, "a red", KEY, **OPTIONS, image_steps=1)
    there = {"clip_l", "clip_g", "t5"} - {*absent}
    assert {one.encoder for one in record.prompt.encoders} == there
    streams = {group.stream for group in record.attention.groups if group.word is not None}
    assert streams == {"t5" if name == "t5" else "clip" for name in there}
    if "t5" in absent:
        assert "Absent from this model: T5; zeros stand in" in look.page(record)


def test_blocks_and_steps_of_the_maps_are_chosen(model):
    record = look.trace(
        *parts(model), "a", KEY, **OPTIONS | {"steps": 5}, attention_steps=2, attention_blocks=[2, 0], image_steps=3
    )
    assert record.attention.steps == (0, 4) and record.attention.blocks == (0, 2)
    assert record.attention.to_words.shape == (2, 2, len(record.attention.groups), 4, 5)
    assert record.attention.from_words[:, 0].isfinite().all() and record.attention.from_words[:, 1].isnan().all()
    assert record.frames.steps == (0, 2, 4) and record.frames.states.shape == (3, 3, 64, 80)
    assert look.trace(*parts(model), "a", KEY, **OPTIONS, attention_steps=0).attention is None


def test_steps_are_spaced_evenly_with_both_ends():
    assert evenly(None, 4) == evenly(9, 4) == (0, 1, 2, 3) and evenly(1, 5) == (4,) and evenly(0, 5) == ()
    assert evenly(3, 28) == (0, 14, 27)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ["a", "b"]}, "one prompt, not at 2 prompts"),
        ({"attention_steps": -1}, "attention_steps -1 must be at least 0"),
        ({"image_steps": 0}, "image_steps 0 must be at least 1"),
        ({"attention_blocks": [1, 3]}, r"attention_blocks \[3\] are not among the blocks 0 to 2"),
    ],
)
def test_wrong_arguments_are_named(model, change, words):
    arguments = {"prompt": "a", **OPTIONS, **change}
    with pytest.raises(ValueError, match=words):
        look.trace(*parts(model), arguments.pop("prompt"), KEY, **arguments)


def test_a_run_without_steps_is_refused(model):
    params, config, tables = parts(model)
    request = Request("a", KEY, TextOptions(t5_length=8), SamplingOptions(2), start=replace(START["mask"], strength=0))
    with pytest.raises(ValueError, match="takes none of the 2 steps"):
        look.trace_request(params, config, tables, request)


@pytest.fixture(scope="module")
def tables(model, tokenizer_files):
    clip = [bpe.init(tokenizer_files / name) for name in ("tokenizer", "tokenizer_2")]
    t5 = unigram.init(tokenizer_files / "tokenizer_3")
    return model.tokenizers._replace(clip_l=clip[0], clip_g=clip[1], t5=t5)


PROMPT = "a large red circle, (left:1.3) of \u00e9toiles \U0001f600 and quite unknown-words"


@pytest.mark.parametrize(
    "options",
    [
        TextOptions(),
        TextOptions(weighted=True),
        TextOptions(long_prompts=True),
        TextOptions(weighted=True, long_prompts=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("text", [PROMPT, "red " * 60, ""], ids=["words", "long", "empty"])
def test_tokens_are_those_that_the_encoders_read(model, tables, options, text):
    """Ids in order, positions in the context, and every token in the word that holds its last character."""
    names = ("clip_l", "clip_g", "t5")
    prompt = tokens.read(model.config, tables, text, options, names, 16)
    kept = {"weighted": options.weighted, "long_prompts": options.long_prompts}
    ids = tokenize_prompts(model.config, tables, [text], t5_length=16, **kept)[0]
    for one in prompt.encoders:
        read = [token for token in one.tokens if token.kind != "cut"]
        assert [token.id for token in read] == getattr(ids, one.encoder)[0].flatten().tolist()
        assert [token.position for token in read] == list(range(len(read)))
        own = [token for token in one.tokens if token.kind in ("text", "unknown", "cut")]
        module, own_tables = (unigram if one.encoder == "t5" else bpe), getattr(tables, one.encoder)
        whole = module.apply(own_tables, [prompt.text], length=None)[0]
        assert [token.id for token in own] == whole[0 if one.encoder == "t5" else 1 : -1]
        # CLIP reads all chunks of a long prompt; all else is cut at the encoder's length.
        assert any(token.kind == "cut" for token in one.tokens) == (
            len(whole) > one.length and not (options.long_prompts and one.encoder != "t5")
        )
        assert all((token.word is not None) == (token.kind in ("text", "unknown", "cut")) for token in one.tokens)
    if prompt.words:
        places = prompt.positions("t5", 0)
        assert places and all(prompt.clip_tokens <= place < prompt.clip_tokens + 16 for place in places)


@pytest.mark.filterwarnings("ignore:weights stored in")
def test_the_shipped_model_looks_for_the_circle_on_the_left_and_for_the_star_on_the_right():
    """params/tiny: CLIP's words of shapes and T5's words of colours are attended to where their object is."""
    model = weights.load(shipped.folder(), dtype=torch.float32)
    prompt = "a large red circle left of a small blue star on a white background"
    record = look.trace(*model, prompt, KEY, attention_steps=4, image_steps=2)
    mean = record.attention.to_words.mean((0, 1))
    left, right = mean[..., :4].mean((1, 2)), mean[..., 4:].mean((1, 2))
    share = {
        (group.stream, record.prompt.words[group.word]): float(left[index] / right[index])
        for index, group in enumerate(record.attention.groups)
        if group.word is not None
    }
    assert share["clip", "circle"] > 3 and share["t5", "red"] > 3
    assert share["clip", "star"] < 1 / 3 and share["t5", "blue"] < 1 / 2


def test_tokens_of_a_word_spell_it(model, tables):
    text = "a large red circle left of it"
    prompt = tokens.read(model.config, tables, text, TextOptions(), ("clip_l", "clip_g", "t5"), 64)
    assert list(prompt.words) == text.split()
    for one in prompt.encoders:
        for index, word in enumerate(prompt.words):
            parts = [token.text for token in one.tokens if token.word == index and token.kind == "text"]
            assert "".join(parts).replace("</w>", "").replace("\u2581", "") == word
