"""A model without any text encoder is refused, one without some is noted, by every function that encodes prompts."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from functional_sd3 import cli, pipeline, weights
from functional_sd3.core import prng
from functional_sd3.flow import ode
from functional_sd3.formats.notes import Note, note, printed
from functional_sd3.text import conditioning
from functional_sd3.text.completeness import check_encoders
from tests.models import parts

KEY = prng.key(0)
ENCODERS = ("clip_l", "clip_g", "t5")
PROMPTS = ["a red circle"]
IMAGES = torch.full((1, 3, 64, 64), 0.5)


def lacking(model, *absent):
    params = {name: part for name, part in model.params.items() if name not in absent}
    return weights.Model(params, replace(model.config, **dict.fromkeys(absent)), model.tokenizers)


DRAWING = {
    "generate": lambda m: pipeline.generate(*parts(m), PROMPTS, KEY, steps=1),
    "generate, offloaded": lambda m: pipeline.generate(*parts(m), PROMPTS, KEY, steps=1, offload=True),
    "image_to_image": lambda m: pipeline.image_to_image(*parts(m), PROMPTS, IMAGES, KEY, steps=1),
    "inpaint": lambda m: pipeline.inpaint(*parts(m), PROMPTS, IMAGES, torch.ones(1, 1, 64, 64), KEY, steps=1),
    "edit": lambda m: pipeline.edit(*parts(m), PROMPTS, PROMPTS, IMAGES, steps=1),
    "flow_edit": lambda m: pipeline.flow_edit(*parts(m), PROMPTS, PROMPTS, IMAGES, KEY, steps=1),
    "interpolate": lambda m: pipeline.interpolate(*parts(m), ["a red circle", "a blue star"], KEY, frames=2, steps=1),
    "trajectory": lambda m: pipeline.trajectory(*parts(m), PROMPTS, KEY, steps=1),
    "encode": lambda m: pipeline.encode(*parts(m), PROMPTS),
    "encode_from": lambda m: pipeline.encode_from(m.params.__getitem__, *parts(m)[1:], PROMPTS),
    "conditioning.apply": lambda m: conditioning.apply(*parts(m), PROMPTS),
}


@pytest.mark.parametrize("name", DRAWING)
def test_a_model_without_encoders_is_refused_with_what_to_download_and_one_without_t5_is_noted(model, name):
    said = r"no text encoder.*clip_l\.safetensors, clip_g\.safetensors and t5xxl.*--params"
    with pytest.raises(ValueError, match=said):
        DRAWING[name](lacking(model, *ENCODERS))
    with pytest.warns(Note, match="the text encoder T5 is missing"):
        DRAWING[name](lacking(model, "t5"))


@pytest.mark.parametrize("absent", [("clip_l",), ("clip_g", "t5")])
def test_every_absent_encoder_is_named_with_its_file(absent, model):
    with pytest.warns(Note) as caught:
        check_encoders([name for name in ENCODERS if name not in absent], model.tokenizers)
    (one,) = caught
    files = {"clip_l": "clip_l.safetensors", "clip_g": "clip_g.safetensors", "t5": "t5xxl_fp16.safetensors"}
    assert all((files[name] in str(one.message)) == (name in absent) for name in ENCODERS)
    assert Path(one.filename).name == "test_completeness.py", "the warning is at the caller's line"


def test_the_error_for_a_missing_tokenizer_names_download_and_option(model):
    bare = model._replace(tokenizers=weights.Tokenizers())
    expected = r"no tokenizer for clip_l, clip_g, t5.*download tokenizer/, tokenizer_2/ and tokenizer_3/.*--params"
    with pytest.raises(ValueError, match=expected):
        pipeline.generate(*parts(bare), PROMPTS, KEY, steps=1)
    some = model._replace(tokenizers=model.tokenizers._replace(t5=None))
    with pytest.raises(ValueError, match=r"no tokenizer for t5, .*download tokenizer_3/ of .*--params"):
        pipeline.generate(*parts(some), PROMPTS, KEY, steps=1)


def test_without_t5_the_image_is_the_one_of_zeros_in_its_place(model):
    partial = lacking(model, "t5")
    with pytest.warns(Note):
        drawn = pipeline.generate(*parts(partial), PROMPTS, KEY, steps=2, method=ode.EULER)
    by_hand = pipeline.generate(
        {**model.params, "t5": {**model.params["t5"], "final_norm": {"weight": torch.zeros(model.config.t5.width)}}},
        *parts(model)[1:], PROMPTS, KEY, steps=2,
    )  # fmt: skip
    assert torch.allclose(drawn, by_hand, atol=1e-6)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, absent in {"bare": ENCODERS, "without_t5": ("t5",)}.items():
        weights.save(folder / f"{name}.safetensors", lacking(model, *absent), layout="single")
    weights.save(folder / "whole", model)
    shutil.copytree(folder / "whole", folder / "gone")
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        shutil.rmtree(folder / "gone" / name)
    shutil.copytree(folder / "whole", folder / "t5_gone")
    shutil.rmtree(folder / "t5_gone" / "text_encoder_3")
    image = folder / "image.png"
    Image.new("RGB", (64, 64), "red").save(image)
    return folder


@pytest.mark.parametrize("source", ["bare.safetensors", "gone"])
def test_every_drawing_command_refuses_a_model_without_encoders(files, source, tmp_path, capsys):
    image = str(files / "image.png")
    commands = {
        "generate": ["a red circle"],
        "edit": [image, "--from", "a", "--to", "b"],
        "interpolate": ["a", "b"],
        "likelihood": [image, "--prompt", "a"],
    }
    for command, words in commands.items():
        out = [] if command == "likelihood" else ["--out", str(tmp_path / "out/")]
        assert cli.main([command, *words, "--params", str(files / source), *out]) == 1
        assert "the model has no text encoder" in capsys.readouterr().err


def test_a_listed_encoder_that_is_not_there_is_one_note_line(files, tmp_path, capsys):
    command = ["generate", "a red circle", "a star", "--steps", "1", "--params", str(files / "t5_gone")]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "note: the text encoder" in line]
    assert len(said) == 1 and "T5 is missing or left out (text_encoder_3/ or t5xxl_fp16.safetensors)" in said[0]


def test_notes_are_printed_once_escaped_and_other_warnings_stay(capsys):
    with printed():
        for _ in range(2):
            note("a\x1b[2Jb")
    assert capsys.readouterr().err == "note: a\\x1b[2Jb\n"
    script = "import warnings\nfrom functional_sd3.formats.notes import printed\nwith printed(): warnings.warn('other')"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stderr
    assert "UserWarning: other" in said and "note:" not in said
