"""Folders of folders, as ComfyUI's `models/`: components found within bounds, doubts named, the rest passed over."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import save_file

from functional_sd3 import weights
from functional_sd3.formats.notes import Note
from functional_sd3.weights import WeightsError, nested, shipped
from tests.models import random_model

PLACES = {
    "sd3.safetensors": "checkpoints/sd3/medium",
    "clip_l.safetensors": "text_encoders",
    "clip_g.safetensors": "clip/sd3",
    "t5xxl.safetensors": "text_encoders/t5",
}


@pytest.fixture
def models(tmp_path):
    """ComfyUI's folders with one model, its files some levels down, and tokenizers."""
    root = tmp_path / "models"
    weights.save(tmp_path / "flat", random_model(), layout="stability")
    for name, place in PLACES.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / "flat" / name).rename(root / place / name)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(tmp_path / "flat" / name, root / "tokenizers" / name)
    for name in ("loras", "vae", "unet", "configs"):
        (root / name).mkdir()
    return root


def problems_of(path, **options) -> tuple[str, ...]:
    with pytest.raises(WeightsError) as caught:
        weights.load(path, **options)
    return caught.value.problems


def test_files_and_tokenizers_are_found_levels_down(models):
    expected, found = random_model(), weights.load(models)
    assert found.params.keys() == expected.params.keys()
    assert weights.missing(found) == []
    assert weights.load(models, only="clip_g").params.keys() == {"clip_g"}
    described = weights.describe(models, values=False)
    assert [part.component for part in described.parts] == ["clip_l", "clip_g", "t5", "transformer", "vae"]
    assert described.missing == []


def test_a_tokenizer_json_alone_is_recognised_by_its_model(tmp_path):
    """transformers 5 saves T5's tokenizer so, without spiece.model."""
    source = shipped.folder() / "tokenizer_3"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path)
    assert weights.load(tmp_path).tokenizers == weights.load(source).tokenizers
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    assert "is not a CLIP byte-pair tokenizer" in problems_of(tmp_path)[0]


def test_folders_further_down_are_not_entered(models):
    deep = models / "checkpoints" / "sd3" / "medium"
    (deep / "old").mkdir()
    (deep / "sd3.safetensors").rename(deep / "old" / "sd3.safetensors")
    assert "transformer" not in weights.load(models).params


def test_several_candidates_are_all_named(models):
    shutil.copy(models / "text_encoders/t5/t5xxl.safetensors", models / "clip" / "another.safetensors")
    shutil.copy(models / "text_encoders/t5/t5xxl.safetensors", models / "text_encoders" / "third.safetensors")
    (problem,) = problems_of(models)
    for name in ("text_encoders/t5/t5xxl.safetensors", "clip/another.safetensors", "text_encoders/third.safetensors"):
        assert str(models / name) in problem
    assert problem.startswith("t5 is in ")
    assert weights.load(models, only=["transformer", "vae"]).params.keys() == {"transformer", "vae"}


def test_weights_of_other_models_are_passed_over_with_a_note_and_broken_ones_are_an_error(models):
    save_file({"conditioner.embedders.0.x": torch.zeros(1)}, models / "checkpoints" / "xl.safetensors")
    save_file({"a.b": torch.zeros(1)}, models / "unet" / "unknown.safetensors")
    (models / "loras" / "broken.safetensors").write_bytes(b"x" * 100)
    with pytest.warns(Note, match="passed over: .*xl.safetensors: is a checkpoint of Stable Diffusion XL.*unknown"):
        found = weights.load(models)
    assert weights.missing(found) == []
    (models / "unet" / "broken.safetensors").write_bytes(b"x" * 100)
    with pytest.warns(Note):
        assert "unet/broken.safetensors: is a text file" in problems_of(models)[0]


def test_a_folder_of_other_models_alone_says_which(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    save_file({"conditioner.embedders.0.x": torch.zeros(1)}, tmp_path / "checkpoints" / "xl.safetensors")
    (problem,) = problems_of(tmp_path)
    assert "holds no weights that are known" in problem and "xl.safetensors: is a checkpoint of" in problem


def test_tokenizers_that_differ_are_named(models):
    copy = models / "clip" / "tokenizer"
    shutil.copytree(models / "tokenizers" / "tokenizer", copy)
    assert weights.missing(weights.load(models)) == []
    vocab = json.loads((copy / "vocab.json").read_text())
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (copy / "vocab.json").write_text(json.dumps(vocab))
    (problem,) = problems_of(models)
    assert "a tokenizer of clip_l is in" in problem and str(copy) in problem


def test_a_cache_of_downloads_is_a_model(tmp_path):
    place = tmp_path / "models--stabilityai--sd3" / "snapshots" / "0123abcd"
    weights.save(place, random_model())
    assert weights.missing(weights.load(place.parents[1])) == []


def test_circles_of_links_end_and_too_many_folders_are_refused(models, monkeypatch):
    (models / "vae" / "vae").symlink_to("..")
    (models / "unet" / "again").symlink_to("../checkpoints")
    assert weights.missing(weights.load(models)) == []
    monkeypatch.setattr(nested, "MAX_FOLDERS", 5)
    assert "more than 5 folders" in problems_of(models)[0]
    monkeypatch.setattr(nested, "MAX_FOLDERS", 500)
    monkeypatch.setattr(nested, "MAX_FILES", 2)
    assert "more than 2 files of weights" in problems_of(models)[0]


def test_of_files_in_two_variants_the_one_that_is_asked_for_is_taken(models):
    plain = models / "text_encoders/t5/t5xxl.safetensors"
    shutil.copy(plain, plain.with_name("t5xxl.fp16.safetensors"))
    assert "t5 is in" in problems_of(models)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        assert "t5" in weights.load(models, variant="fp16").params
        parts = {part.component: part for part in weights.describe(models, variant="fp16", values=False).parts}
    assert parts["t5"].where.endswith("t5xxl.fp16.safetensors")
