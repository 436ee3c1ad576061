"""Caches on the command line: what is named is what is drawn and recorded, and nonsense is named."""

import shlex

import pytest
import torch
from PIL import Image

from functional_sd3 import cli, pipeline, weights
from functional_sd3.cli import image_settings
from functional_sd3.core import prng
from functional_sd3.flow import caches
from functional_sd3.image import pixels
from tests import models
from tests.models import parts

PROMPT = "a large red circle on a white background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cached")
    weights.save(root / "model", models.random_model())
    return root


def run(folder, *options, command="generate", words=(PROMPT,)) -> int:
    common = [command, *words, "--params", folder / "model", "--steps", 8, "--out", folder / "out.png"]
    return cli.main([str(word) for word in (*common, *options)])


def bytes_of(path) -> torch.Tensor:
    with Image.open(path) as image:
        return pixels.to_bytes(pixels.from_pil(image))[0].int()


@pytest.mark.parametrize("words", ["extrapolate:every=2", "hold:every=4,warmup=0.25", "first-block:threshold=0.7"])
def test_the_image_is_that_of_the_pipeline_and_is_drawn_again_by_its_record(folder, words):
    assert run(folder, "--cache", words) == 0
    drawn = bytes_of(folder / "out.png")
    model = weights.load(folder / "model", dtype=torch.float32)
    with torch.no_grad():
        images = pipeline.generate(*parts(model), [PROMPT], prng.key(0)[None], steps=8, cache=words)
        exact = pipeline.generate(*parts(model), [PROMPT], prng.key(0)[None], steps=8)
    assert torch.equal(pixels.to_bytes(images)[0].int(), drawn)
    assert not torch.equal(pixels.to_bytes(exact)[0].int(), drawn)
    record = image_settings.read_record(folder / "out.png")
    request = pipeline.read_description(record["request"])
    assert request.sampling.cache == caches.parse(words) and record["command"]["cache"] == words
    again = shlex.split(image_settings.command(record["command"]))[1:]
    assert cli.main([*again, "--out", str(folder / "again.png")]) == 0
    assert torch.equal(bytes_of(folder / "again.png"), drawn)


def test_fast_is_recorded_as_the_cache_that_it_is(folder):
    assert run(folder, "--fast", "--steps", 12) == 0
    drawn = bytes_of(folder / "out.png")
    settings = image_settings.read_record(folder / "out.png")["command"]
    assert settings["cache"] == caches.write(caches.FAST) and "fast" not in settings
    assert run(folder, "--cache", caches.write(caches.FAST), "--steps", 12) == 0
    assert torch.equal(bytes_of(folder / "out.png"), drawn)
    assert run(folder, "--steps", 12) == 0
    assert not torch.equal(bytes_of(folder / "out.png"), drawn)
    assert "cache" not in image_settings.read_record(folder / "out.png")["command"]


def test_other_drawing_commands_take_it(folder):
    assert (
        run(
            folder,
            "--cache",
            "hold",
            command="interpolate",
            words=(PROMPT, "a star"),
        )
        == 0
    )
    source = folder / "source.png"
    pixels.to_pil(prng.uniform(prng.key(1), (1, 3, 64, 64)))[0].save(source)
    assert run(folder, "--from", "a", "--to", "b", "--cache", "hold", command="edit", words=(source,)) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (("--cache", "extrapolat"), "--cache 'extrapolat': 'extrapolat' must be one of"),
        (("--cache", "extrapolat"), "did you mean extrapolate?"),
        (("--cache", "hold:every=x"), "--cache 'hold:every=x': every cannot be 'x'"),
        (("--cache", "hold", "--fast"), "leave out one of --fast and --cache"),
        (("--fast", "--method", "dopri5"), "--fast leaves out velocities, by whose errors --method dopri5"),
        (("--cache", "hold", "--method", "bosh3"), "--cache leaves out velocities"),
        (("--fast", "--method", "meanflow"), "--method meanflow takes few steps"),
        (("--cache", "first-block", "--tile", "64"), "--tile evaluates several"),
        (("--cache", "teacache", "--mesh", "guidance=2"), "--mesh evaluates several"),
        (("--cache", "interval:start=0.1"), "--guidance interval"),
    ],
)
def test_words_without_meaning_are_errors_that_name_the_flag(folder, capsys, options, message):
    assert run(folder, *options) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--direct", "--exact"])
def test_edits_whose_steps_need_every_velocity_refuse_it(folder, capsys, option):
    source = folder / "source.png"
    pixels.to_pil(prng.uniform(prng.key(1), (1, 3, 64, 64)))[0].save(source)
    words = ("--from", "a", "--to", "b", option, "--fast")
    assert run(folder, *words, command="edit", words=(source,)) != 0
    assert f"--fast cannot be used here: {option}" in capsys.readouterr().err


def test_a_cache_that_leaves_out_nothing_is_noted(folder, capsys):
    assert run(folder, "--fast", "--steps", 3) == 0
    assert "leaves out none of 3 steps" in capsys.readouterr().err


def test_a_student_of_few_steps_refuses_it(folder, capsys):
    out = folder / "student.png"
    assert cli.main(["generate", PROMPT, "--params", "tiny-4", "--fast", "--out", str(out)]) != 0
    assert "the model was distilled to 4 steps, each of which counts" in capsys.readouterr().err and not out.exists()
