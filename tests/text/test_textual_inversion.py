"""Words of one's own: new tables and new trees, several vectors a word, folders that keep them, and refusals."""

import random

import pytest
import torch

from functional_sd3 import pipeline, weights
from functional_sd3.core import prng, tree
from functional_sd3.formats import files
from functional_sd3.text import bpe, clip, textual_inversion, unigram
from functional_sd3.text.textual_inversion import Word
from functional_sd3.weights import WeightsError, load_inversion, save_inversion
from tests import models
from tests.models import parts

MODEL = models.random_model()
WIDTHS = {name: getattr(MODEL.config, name).width for name in textual_inversion.ENCODERS}


def word(token="<thing>", count=2, names=textual_inversion.ENCODERS, seed=0) -> Word:
    generator = torch.Generator().manual_seed(seed)
    return Word(token, {name: torch.randn(count, WIDTHS[name], generator=generator) for name in names})


def learned(*words: Word) -> weights.Model:
    return MODEL._replace(**textual_inversion.add(*parts(MODEL), *words)._asdict())


def test_nothing_that_was_given_is_changed():
    before = tree.map(torch.clone, MODEL.params)
    tables = [bpe.apply(MODEL.tokenizers.clip_l, "<thing>", length=None)]
    learned(word())
    assert tree.allclose(before, MODEL.params, rtol=0, atol=0)
    assert tables == [bpe.apply(MODEL.tokenizers.clip_l, "<thing>", length=None)]


def test_a_word_stands_for_its_vectors_where_it_is_typed():
    ours, vectors = learned(word(count=3)), word(count=3).vectors
    for name, module, table in (("clip_l", bpe, "token_embedding"), ("t5", unigram, "embedding")):
        tables = getattr(ours.tokenizers, name)
        (row,) = module.apply(tables, "a <thing> here", length=None)
        (plain,) = module.apply(tables, "a  here", length=None)
        fresh = [i for i in row if i not in plain]
        assert len(fresh) == 3 and len(row) == len(plain) + 3
        assert torch.equal(ours.params[name][table]["weight"][fresh], vectors[name])
        (spans,) = module.offsets(tables, "a <thing> here")
        assert len(spans) == len(row) and spans.count((2, 9)) == 3


def test_other_texts_read_as_before():
    ours = learned(word())
    for texts in (["a red circle", ""], ["a blue star"]):
        for before, after in zip(
            pipeline.encode(*parts(MODEL), texts), pipeline.encode(*parts(ours), texts), strict=True
        ):
            assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_the_end_of_a_text_is_found_though_words_have_higher_ids():
    legacy = clip.LEGACY_EOS_ID
    from dataclasses import replace

    config = replace(MODEL.config, clip_l=replace(MODEL.config.clip_l, eos_id=legacy))
    ours = textual_inversion.add(MODEL.params, config, MODEL.tokenizers, word())
    assert ours.config.clip_l.eos_id == MODEL.tokenizers.clip_l.eos_id
    ids = bpe.apply(ours.tokenizers.clip_l, "<thing>", length=12)
    output = clip.apply(ours.params["clip_l"], ours.config.clip_l, ids)
    assert torch.equal(output.pooled, output.last[:, ids[0].tolist().index(MODEL.tokenizers.clip_l.eos_id)])


def test_an_encoder_without_vectors_reads_the_word_as_text():
    ours = learned(word(names=("clip_l",)))
    assert ours.params["t5"] is MODEL.params["t5"] and ours.tokenizers.t5 is MODEL.tokenizers.t5
    assert ours.tokenizers.clip_g is MODEL.tokenizers.clip_g


def test_words_are_added_one_after_another():
    both, first, second = learned(word("<a>", 2), word("<b>", 1)), word("<a>", 2).vectors, word("<b>", 1).vectors
    ids = bpe.apply(both.tokenizers.clip_g, "<a><b>", length=None)[0][1:-1]
    rows = both.params["clip_g"]["token_embedding"]["weight"][ids]
    assert torch.equal(rows, torch.cat([first["clip_g"], second["clip_g"]]))


def test_vectors_are_differentiable_through_an_image():
    vectors = {name: value.requires_grad_() for name, value in word(count=1).vectors.items()}
    ours = learned(Word("<thing>", vectors))
    image = pipeline.generate(*parts(ours), "a <thing>", prng.key(0), steps=1)
    gradients = torch.autograd.grad(image.square().mean(), list(vectors.values()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_a_saved_model_keeps_its_words(tmp_path):
    ours = learned(word(count=3), word("<other>", 1))
    weights.save(tmp_path / "model", ours)
    again = weights.load(tmp_path / "model")
    texts = ["a <thing> beside an <other>", "nothing"]
    for before, after in zip(pipeline.encode(*parts(ours), texts), pipeline.encode(*parts(again), texts), strict=True):
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert again.tokenizers.t5 == ours.tokenizers.t5
    assert again.tokenizers.clip_l.multi_token == ours.tokenizers.clip_l.multi_token


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_3"])
@pytest.mark.parametrize("value", [3, [["<nobody>"]], [[]]])
def test_folders_with_invalid_words_are_refused(name, value, tmp_path):
    import json

    weights.save(tmp_path, learned(word()))
    path = tmp_path / name / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "several_vectors": value}))
    with pytest.raises(WeightsError, match="several_vectors"):
        weights.load(tmp_path)


def test_a_file_is_a_word(tmp_path):
    save_inversion(tmp_path / "cat-toy.safetensors", word())
    actual = load_inversion(tmp_path / "cat-toy.safetensors")
    assert actual.token == word().token and not tree.diff(dict(actual.vectors), dict(word().vectors))
    assert set(files.shapes(tmp_path / "cat-toy.safetensors")) == {"clip_l", "clip_g", "t5xxl"}
    assert load_inversion(tmp_path / "cat-toy.safetensors", token="toy").token == "toy"
    files.write_atomic(tmp_path / "one.safetensors", {"clip_l": torch.ones(WIDTHS["clip_l"])})
    assert load_inversion(tmp_path / "one.safetensors").vectors["clip_l"].shape == (1, WIDTHS["clip_l"])
    assert load_inversion(tmp_path / "one.safetensors").token == "<one>"


def test_the_folder_of_a_training_run_is_its_word(tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(WeightsError, match=r"without learned_embeds.safetensors: it holds a LoRA \(--lora\)"):
        load_inversion(tmp_path)
    save_inversion(tmp_path / "learned_embeds.safetensors", word())
    assert load_inversion(tmp_path).token == word().token
    assert load_inversion(tmp_path, token="<other>").token == "<other>"


@pytest.mark.parametrize(("width", "encoder"), [(768, "clip_l"), (1280, "clip_g"), (4096, "t5")])
@pytest.mark.parametrize(
    ("name", "typed"),
    [("emb_params", "<x>"), ("string_to_param.*", "<x>"), ("*", "<x>"), ("<cat-toy>", "<cat-toy>"), ("sks", "sks")],
)
def test_vectors_without_the_name_of_an_encoder_are_recognised_by_their_width(tmp_path, width, encoder, name, typed):
    files.write_atomic(tmp_path / "x.safetensors", {name: torch.ones(2, width)})
    actual = load_inversion(tmp_path / "x.safetensors")
    assert actual.token == typed and {key: list(value.shape) for key, value in actual.vectors.items()} == {
        encoder: [2, width]
    }
    assert load_inversion(tmp_path / "x.safetensors", token="toy").token == "toy"


def test_a_mutated_word_loads_or_is_one_error(tmp_path):
    path = tmp_path / "x.safetensors"
    save_inversion(path, word())
    whole, draw = path.read_bytes(), random.Random(0)
    head = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            content[draw.randrange(head)] = draw.randrange(256)
        path.write_bytes(bytes(content[: draw.choice((None, draw.randrange(len(content))))]))
        try:
            load_inversion(path)
        except WeightsError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"emb_params": torch.ones(1, 4)}, r"emb_params names no encoder and is 4 wide, .*clip_l 768, clip_g 1280"),
        ({"<cat>": torch.ones(1, 1024)}, "vectors of width 1024 are of Stable Diffusion 2"),
        ({"clip_l_out": torch.ones(1, 768)}, "clip_l_out: output embeddings of OneTrainer"),
        ({"clip_l": torch.ones(1, 768), "t5_out": torch.ones(1, 4096)}, "t5_out: output embeddings of OneTrainer"),
        ({"bundle_emb.<a>.clip_g_out": torch.ones(1, 1280)}, "output embeddings"),
        ({"clip_h": torch.ones(1, 4), "\x1b[31m": torch.ones(1, 4)}, r"\\x1b\[31m is no encoder"),
        ({"\x1b[31m": torch.ones(1, 768)}, r"its word .*x1b.*31m. cannot be typed in a prompt"),
        ({"clip_l": torch.ones(513, 4)}, "clip_l has 513 vectors"),
        ({"clip_l": torch.ones(1, 1, 4)}, r"clip_l is torch.float32 of shape \[1, 1, 4\], must be floats"),
        ({"clip_l": torch.ones(2, 4).int()}, "clip_l is torch.int32"),
        ({"clip_l": torch.full((1, 4), torch.nan)}, "not finite"),
        ({"t5": torch.ones(1, 4), "t5xxl": torch.ones(1, 4)}, "both t5 and t5xxl"),
        ({}, "holds no vectors"),
    ],
)
def test_files_that_are_no_words_say_so(tensors, message, tmp_path):
    files.write_atomic(tmp_path / "x.safetensors", tensors)
    with pytest.raises(WeightsError, match=message):
        load_inversion(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "wrong, message",
    [
        (Word("", {"clip_l": torch.ones(1, 4)}), "the word '' must not be empty"),
        (Word("<a>", {"bert": torch.ones(1, 4)}), "'<a>' has vectors for 'bert'; encoders are clip_l, clip_g, t5"),
        (Word("<a>", {}), "for no encoder, of which the model has none"),
        (Word("<a>", {"clip_l": torch.ones(1, 5)}), r"vectors of shape \[1, 5\] for clip_l, whose width is"),
        (
            Word("<a>", {"clip_l": torch.ones(1, WIDTHS["clip_l"]), "t5": torch.ones(2, WIDTHS["t5"])}),
            "as many vectors for each encoder",
        ),
        (Word("<|endoftext|>", {"clip_l": torch.ones(1, WIDTHS["clip_l"])}), "is a token of clip_l already"),
    ],
)
def test_words_that_cannot_be_added_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        textual_inversion.add(*parts(MODEL), wrong)
