"""Emphasis and long prompts: the notation, the weights of tokens, and the encoders' outputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functional_sd3 import pipeline
from functional_sd3.core import prng
from functional_sd3.formats.notes import Note
from functional_sd3.text import bpe, clip, conditioning, t5, unigram, weighting
from tests import models
from tests.models import parts

MODEL = models.random_model()
LENGTH = min(MODEL.tokenizers.clip_l.model_max_length, MODEL.config.clip_l.length)
T5_LENGTH = 40


def weights_of(prompt: str) -> list[tuple[str, float]]:
    """Runs of one weight."""
    read = weighting.parse(prompt)
    assert len(read.text) == len(read.weights)
    runs: list[tuple[str, float]] = []
    for character, weight in zip(read.text, read.weights, strict=True):
        if runs and runs[-1][1] == weight:
            runs[-1] = (runs[-1][0] + character, weight)
        else:
            runs.append((character, weight))
    return [(text, round(weight, 6)) for text, weight in runs]


@pytest.mark.parametrize(
    "prompt, meant",
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (red:1.3) cat", [("a ", 1.0), ("red", 1.3), (" cat", 1.0)]),
        ("(red)", [("red", 1.1)]),
        ("((red))", [("red", 1.21)]),
        ("(a (red:1.5) cat:2)", [("a ", 2.0), ("red", 3.0), (" cat", 2.0)]),
        ("(red: 0.5 )", [("red", 0.5)]),
        ("(red:.5)(blue:-1)", [("red", 0.5), ("blue", -1.0)]),
        ("(red:0)", [("red", 0.0)]),
        (r"\(red:1.3\)", [("(red:1.3)", 1.0)]),
        (r"(a \(b\) c:1.2)", [("a (b) c", 1.2)]),
        (r"(a\:1.3)", [("a\\", 1.3)]),
        (r"(b\):1.3)", [("b)", 1.3)]),
        (r"\\(red:2)", [("\\", 1.0), ("red", 2.0)]),
        (r"a\b\\", [("a\\b\\", 1.0)]),
        ("a\\", [("a\\", 1.0)]),
        (":) (: ((open", [(":) (: ((open", 1.0)]),
        ("(a:b:1.5)", [("a:b", 1.5)]),
        ("(red:1.3.4)", [("red:1.3.4", 1.1)]),
        ("(red:big)", [("red:big", 1.1)]),
        ("()", []),
        ("", []),
    ],
)
def test_the_notation_gives_text_and_weights(prompt, meant):
    assert weights_of(prompt) == meant


@given(st.text(alphabet="a b:1.()\\"))
def test_nothing_that_is_typed_is_an_error_and_escaping_all_is_the_text_itself(prompt):
    weighting.parse(prompt)
    escaped = "".join("\\" + character if character in "()\\" else character for character in prompt)
    assert weighting.parse(escaped) == weighting.Weighted(prompt, (1.0,) * len(prompt))


def arguments(prompts, **options):
    return conditioning.tokenize_weighted(MODEL.config, MODEL.tokenizers, prompts, t5_length=T5_LENGTH, **options)


@pytest.mark.parametrize("name, module", [("clip_l", bpe), ("clip_g", bpe), ("t5", unigram)])
def test_a_weight_reaches_the_tokens_of_its_words_only(name, module):
    ids, emphasis = arguments("a (large red:1.5) circle")
    row, weights = (getattr(part, name).flatten().tolist() for part in (ids, emphasis.weights))
    tables = getattr(MODEL.tokenizers, name)
    (plain,) = module.apply(tables, "a large red circle", length=None)
    assert row[: len(plain)] == plain
    (spans,) = module.offsets(tables, "a large red circle")
    expected = [1.5 if end > start and 2 < end <= 11 else 1.0 for start, end in spans]
    assert weights[: len(plain)] == expected and 1.5 in expected
    assert set(weights[len(plain) :]) <= {1.0}


def test_without_notation_and_within_the_length_nothing_changes():
    prompts = ["a red circle", "", "a small blue star left of a green ring"]
    plain = conditioning.apply(*parts(MODEL), prompts, t5_length=T5_LENGTH)
    for options in ({"weighted": True}, {"long_prompts": True}, {"weighted": True, "long_prompts": True}):
        arguments = conditioning.apply(*parts(MODEL), prompts, t5_length=T5_LENGTH, **options)
        assert all(torch.equal(*pair) for pair in zip(arguments, plain, strict=True))
    brackets = conditioning.apply(*parts(MODEL), r"a \(red\) circle", t5_length=T5_LENGTH, weighted=True)
    literal = conditioning.apply(*parts(MODEL), "a (red) circle", t5_length=T5_LENGTH)
    assert all(torch.equal(*pair) for pair in zip(brackets, literal, strict=True))
    off = conditioning.apply(*parts(MODEL), "a (red:1.5) circle", t5_length=T5_LENGTH)
    on = conditioning.apply(*parts(MODEL), "a (red:1.5) circle", t5_length=T5_LENGTH, weighted=True)
    assert not torch.equal(off.context, on.context)


def test_a_weighted_token_lies_on_the_line_from_the_empty_prompt():
    plain = conditioning.apply(*parts(MODEL), "a red circle", t5_length=T5_LENGTH).context
    empty = conditioning.apply(*parts(MODEL), "", t5_length=T5_LENGTH).context
    heavy = conditioning.apply(*parts(MODEL), "a (red:1.7) circle", t5_length=T5_LENGTH, weighted=True)
    moved = (heavy.context != plain).any(-1)
    torch.testing.assert_close(heavy.context[moved], (empty + 1.7 * (plain - empty))[moved])
    ids, emphasis = arguments("a (red:1.7) circle")
    clip_moved = (emphasis.weights.clip_l.flatten(1) != 1) | (emphasis.weights.clip_g.flatten(1) != 1)
    assert torch.equal(moved, torch.cat([clip_moved, emphasis.weights.t5 != 1], dim=1)) and moved.any()
    assert torch.equal(heavy.pooled, conditioning.apply(*parts(MODEL), "a red circle", t5_length=T5_LENGTH).pooled)
    nothing = conditioning.apply(*parts(MODEL), "(a red circle:0)", t5_length=T5_LENGTH, weighted=True).context
    words = bpe.apply(MODEL.tokenizers.clip_l, "a red circle", length=None)[0]
    torch.testing.assert_close(nothing[:, 1 : len(words) - 1], empty[:, 1 : len(words) - 1])


def test_long_prompts_are_read_in_chunks_each_as_a_prompt_of_its_own():
    words = ["red", "blue", "green", "star"] * LENGTH
    ids, _ = arguments(" ".join(words))
    (flat,) = bpe.apply(MODEL.tokenizers.clip_l, " ".join(words), length=None)
    room = LENGTH - 2
    count = -(-(len(flat) - 2) // room)
    assert ids.clip_l.shape == (1, count, LENGTH) and count > 2
    assert torch.cat([chunk[1:-1] for chunk in ids.clip_l[0]])[: len(flat) - 2].tolist() == flat[1:-1]
    assert (ids.clip_l[0, :, 0] == MODEL.tokenizers.clip_l.bos_id).all()
    assert (ids.clip_l == MODEL.tokenizers.clip_l.eos_id).any(-1).all()
    actual = conditioning.encode(MODEL.params, MODEL.config, ids)
    own, width = MODEL.config.clip_l, MODEL.config.clip_l.width
    chunks = [clip.apply(MODEL.params["clip_l"], own, chunk[None]) for chunk in ids.clip_l[0]]
    for index, chunk in enumerate(chunks):
        part = actual.context[:, index * LENGTH : (index + 1) * LENGTH, :width]
        torch.testing.assert_close(part, chunk.penultimate)
    torch.testing.assert_close(actual.pooled[:, : own.projection_width], chunks[0].projected)
    text = t5.apply(MODEL.params["t5"], MODEL.config.t5, ids.t5)
    torch.testing.assert_close(actual.context[:, count * LENGTH :], text)


@given(words=st.integers(0, 3 * LENGTH))
def test_no_token_is_lost_and_chunks_are_as_few_as_can_be(words):
    prompt = weighting.unweighted(["red " * words])
    (rows,) = weighting.clip_rows(MODEL.tokenizers.clip_l, prompt, LENGTH, long=True)
    (flat,) = bpe.apply(MODEL.tokenizers.clip_l, "red " * words, length=None)
    assert len(rows) == max(1, -(-(len(flat) - 2) // (LENGTH - 2)))
    special = {MODEL.tokenizers.clip_l.bos_id, MODEL.tokenizers.clip_l.eos_id}
    kept = [i for row in rows for i in row.ids.tolist() if i not in special]
    assert kept == flat[1:-1]


def test_weights_reach_into_later_chunks():
    prompt = "red " * (LENGTH + 3) + "(blue:1.4)"
    ids, emphasis = arguments(prompt)
    heavy = emphasis.weights.clip_l == torch.tensor(1.4)
    assert not heavy[:, 0].any() and heavy[:, 1].any()
    assert set(ids.clip_l[heavy].tolist()) == set(bpe.apply(MODEL.tokenizers.clip_l, "blue", length=None)[0][1:-1])


def test_shorter_prompts_of_a_batch_end_in_empty_chunks():
    ids, _ = arguments(["red " * 2 * LENGTH, "red"])
    blank = bpe.apply(MODEL.tokenizers.clip_l, "", length=LENGTH)[0]
    assert all(torch.equal(chunk, blank) for chunk in ids.clip_l[1, 1:])


@pytest.mark.parametrize("absent", ["clip_l", "clip_g", "t5"])
def test_absent_encoders_leave_zeros(absent):
    params = {name: part for name, part in MODEL.params.items() if name != absent}
    prompts, options = ["red " * 2 * LENGTH, "(red:1.2)"], {"weighted": True, "long_prompts": True}
    whole = conditioning.apply(*parts(MODEL), prompts, t5_length=T5_LENGTH, **options)
    with pytest.warns(Note, match="text encoder .* is missing"):
        without = conditioning.apply(params, *parts(MODEL)[1:], prompts, t5_length=T5_LENGTH, **options)
    assert without.context.shape == whole.context.shape and without.pooled.shape == whole.pooled.shape
    kept = without.context != 0
    assert torch.equal(without.context[kept], whole.context[kept]) and not torch.equal(without.context, whole.context)


def test_images_follow_weights_and_the_end_of_long_prompts():
    options = {"steps": 1, "cfg": 2.0}

    def draw(prompt, **more):
        return pipeline.generate(*parts(MODEL), prompt, prng.key(0), **options, **more)

    assert torch.equal(draw("a (red:1.0) star", weighted=True), draw("a red star"))
    assert not torch.equal(draw("a (red:1.5) star", weighted=True), draw("a red star"))
    assert not torch.equal(draw("red " * LENGTH + "star", long_prompts=True), draw("red " * LENGTH + "star"))
