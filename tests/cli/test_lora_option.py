"""`--lora FILE[=SCALE]`: the image of the merged model, recorded in the image, refused before a model is loaded."""

import json
import re
import shlex

import numpy
import pytest
import torch
from PIL import Image

from functional_sd3 import cli, lora, weights
from functional_sd3.cli import image_settings, lora_options
from functional_sd3.core import tree
from tests import models

PROMPT = "a large red circle on a white background"
TARGETS = ("transformer.blocks.*", "clip_l.*.mlp.*", "t5.*.qkv.weight")


def random_lora(config, seed):
    generator = torch.Generator().manual_seed(seed)
    fresh = lora.spec(config, 2, TARGETS)
    draw = lambda path, shape: torch.tensor(2.0) if path.endswith("alpha") else torch.randn(shape, generator=generator)  # noqa: E731
    return tree.map_with_path(lambda path, param: draw(path, param.shape) / 4, fresh)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, two LoRAs for it, and the model with both merged into it (0.7 of the first, half of the second)."""
    folder, model = tmp_path_factory.mktemp("models"), models.random_model()
    weights.save(folder / "base", model)
    one, two = (random_lora(model.config, seed) for seed in (1, 2))
    lora.save(folder / "a=b.safetensors", one)
    (folder / "two").mkdir()
    lora.save(folder / "two" / "pytorch_lora_weights.safetensors", two, layout="kohya")
    weights.save(folder / "merged", model._replace(params=lora.apply(model.params, [one, two], [0.7, 0.5])))
    return folder


@pytest.fixture
def both(place):
    return ["--lora", f"{place / 'a=b.safetensors'}=0.7", "--lora", f"{place / 'two'}=0.5"]


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def pixels(path):
    with Image.open(path) as image:
        return numpy.asarray(image.convert("RGB")).astype(int)


def image_of(path, *words):
    assert run("generate", PROMPT, "--steps", 2, *words, "--out", path) == 0
    return pixels(path)


def test_loras_make_the_image_of_the_model_they_are_merged_into(place, both, tmp_path, capsys):
    plain = image_of(tmp_path / "plain.png", "--params", place / "base")
    merged = image_of(tmp_path / "merged.png", "--params", place / "merged")
    added = image_of(tmp_path / "added.png", "--params", place / "base", *both)
    assert abs(added - merged).max() <= 1 and abs(added - plain).max() > 20
    offloaded = image_of(tmp_path / "offloaded.png", "--params", place / "base", *both, "--offload")
    assert abs(offloaded - added).max() <= 1
    capsys.readouterr()
    assert run("inspect", tmp_path / "added.png") == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[-4:] == both
    assert run(*words[1:], "--out", tmp_path / "again.png") == 0
    assert (pixels(tmp_path / "again.png") == added).all()


def test_a_scale_of_0_is_no_lora_to_the_bit(place, tmp_path):
    plain = image_of(tmp_path / "plain.png", "--params", place / "base")
    none = image_of(tmp_path / "none.png", "--params", place / "base", "--lora", f"{place / 'two'}=0")
    assert (plain == none).all()


def test_quantized_weights_take_loras(place, both, tmp_path):
    assert run("quantize", place / "base", "--out", tmp_path / "small") == 0
    plain = image_of(tmp_path / "plain.png", "--params", tmp_path / "small")
    added = image_of(tmp_path / "added.png", "--params", tmp_path / "small", *both)
    assert abs(added - plain).max() > 20


@pytest.mark.parametrize("words", [
    ("interpolate", PROMPT, "a small blue star", "--frames", 2, "--steps", 1, "--out"),
    ("edit", "IMAGE", "--from", PROMPT, "--to", "a small blue star", "--steps", 2, "--out"),
], ids=lambda words: words[0])  # fmt: skip
def test_other_commands_that_draw_take_and_record_them(place, both, tmp_path, words):
    image_of(tmp_path / "source.png", "--params", place / "base")
    words = [tmp_path / "source.png" if word == "IMAGE" else word for word in words]
    results = {}
    for name, own in {"plain": ["base"], "merged": ["merged"], "added": ["base", *both]}.items():
        assert run(*words, tmp_path / f"{name}.png", "--params", place / own[0], *own[1:]) == 0
        results[name] = pixels(tmp_path / f"{name}.png")
    assert abs(results["added"] - results["merged"]).max() <= 1
    assert abs(results["added"] - results["plain"]).max() > 20
    assert image_settings.read_record(tmp_path / "added.png")["command"]["lora"] == both[1::2]


@pytest.mark.parametrize("words", [
    ("likelihood", "IMAGE", "--prompt", PROMPT, "--by", "loss", "--draws", 2),
    ("evaluate", "prompts", "--count", 1, "--things", 1, "--steps", 1),
], ids=lambda words: words[0])  # fmt: skip
def test_commands_that_measure_take_them(place, both, tmp_path, words, monkeypatch):
    image_of(tmp_path / "source.png", "--params", place / "base")
    words = [tmp_path / "source.png" if word == "IMAGE" else word for word in words]
    assert run(*words, "--params", place / "base", *both, "--json", tmp_path / "added.json") == 0
    assert run(*words, "--params", place / "merged", "--json", tmp_path / "merged.json") == 0
    added, merged = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("added", "merged"))
    if words[0] == "evaluate":
        assert added["lora"] == both[1::2] and added["rows"] == merged["rows"]
    else:
        numbers = [json.dumps(one["prompts"]) for one in (added, merged)]
        values = [[float(word) for word in re.findall(r"-?\d+\.\d+", text)] for text in numbers]
        assert values[0] and values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize("text, said", [
    ("gone.safetensors", "no such file"),
    ("gone.safetensors=0.5", "there is no file"),
    ("two:0.5", "no such file; a scale follows =: two=0.5"),
    ("", "no such file"),
    ("=0.5", "there is no file"),
    ("a" * 5000, "no such file"),
    ("two=abc", "the scale 'abc' must be a number"),
    ("two=nan", "must be a number"),
    ("two=inf", "must be a number"),
    ("two=", "the scale '' must be a number"),
    ("two=1\x1b[2J", r"\\x1b"),
    ("base=0.5", "is a folder without pytorch_lora_weights.safetensors"),
    ("base/transformer/diffusion_pytorch_model.safetensors", "it holds whole weights, not a LoRA"),
    ("base/model_index.json", "model_index.json: "),
])  # fmt: skip
def test_what_is_no_lora_is_said_before_a_model_is_loaded(place, tmp_path, capsys, monkeypatch, text, said):
    monkeypatch.chdir(place)
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    for words in (("generate", PROMPT), ("evaluate", "prompts")):
        assert run(*words, "--params", "base", "--lora", text) == 1
        error = capsys.readouterr().err
        assert said.replace("\\\\", "\\") in error and "\x1b" not in error


def test_a_file_whose_name_holds_an_equals_sign(tmp_path):
    (tmp_path / "x=2").write_bytes(b"")
    (tmp_path / "x").write_bytes(b"")
    assert lora_options.parse(str(tmp_path / "x=2")) == (tmp_path / "x=2", 1.0)
    assert lora_options.parse(str(tmp_path / "x=2=-0.5")) == (tmp_path / "x=2", -0.5)
    assert lora_options.parse(str(tmp_path / "x=3")) == (tmp_path / "x", 3.0)
