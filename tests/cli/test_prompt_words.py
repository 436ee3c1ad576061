"""Prompts from anywhere, notes on words that were not meant or never learned, and scales that are no guidance."""

import io
import json
import os

import pytest
import torch
from PIL import Image

from functional_sd3 import cli
from functional_sd3.cli import image_settings, prompt_words
from functional_sd3.recipes import shapes

PROMPT = "a large red circle on a white background"


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def shown(path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.tensor(list(image.convert("RGB").tobytes()))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("place", ["file", "stdin"])
def test_prompts_come_from_a_file_or_standard_input_without_byte_order_marks(tmp_path, monkeypatch, encoding, place):
    content = "a réd circle\r\n\r\n  a blue star \n".encode(encoding)
    (tmp_path / "prompts.txt").write_bytes(content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    name = str(tmp_path / "prompts.txt") if place == "file" else "-"
    assert prompt_words.listed(["first"], name) == ["first", "a réd circle", "a blue star"]


def test_standard_input_is_drawn(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a red circle\na blue star\n")))
    assert run("generate", "--prompts", "-", "--params", folder, "--steps", 1, "--out", tmp_path / "x.png") == 0
    assert image_settings.read_record(tmp_path / "x.png")["command"]["prompts"] == ["a red circle", "a blue star"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "standard input holds no prompts"), (b"\n \n", "holds no prompts"), (b"\xff\xfe\x00\xd8", "UTF-16"),
     (b"caf\xe9", "save it as UTF-8")],
)  # fmt: skip
def test_text_that_is_no_prompts_is_said(monkeypatch, capsys, content, message):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert run("generate", "--prompts", "-") == 1
    error = capsys.readouterr().err
    assert message in error and "--prompts -" in error and error.count("\n") == 1


def test_a_pipe_with_a_name_is_refused_and_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert run("generate", "--prompts", tmp_path / "pipe") == 1
    assert "is a named pipe, not a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompts", "noted"),
    [
        (["a", "red", "circle"], True),
        (["red", "blue"], True),
        (["red"], False),
        (["a red circle", "blue"], False),
        (["a red circle"], False),
    ],
)
def test_forgotten_quotes_are_noted(capsys, prompts, noted):
    prompt_words.note_missing_quotes(prompts)
    error = capsys.readouterr().err
    assert (f'one prompt needs quotes: "{" ".join(prompts)}"' in error) == noted == bool(error)


def test_the_vocabulary_is_that_of_the_captions():
    words = set()
    for index in range(400):
        (scene,) = shapes.scenes(torch.tensor([index, 1]), 1, hold_out=False)
        words |= {word for wording in range(6) for word in shapes.caption(scene, wording).replace(",", "").split()}
    assert words == shapes.vocabulary()


def test_words_that_the_shipped_model_never_learned_are_noted(folder, tmp_path, capsys):
    common = ("--steps", 1, "--out", tmp_path / "x.png")
    assert run("generate", "A large RED lighthouse, in fog", *common, "--negative", "ugly") == 0
    error = capsys.readouterr().err
    assert "the shipped model never learned: lighthouse, in, fog, ugly" in error and PROMPT in error
    assert run("generate", PROMPT, "a small blue star above a large green ring", *common) == 0
    assert "never learned" not in capsys.readouterr().err
    assert run("generate", "a lighthouse", "--params", folder, *common) == 0
    assert "never learned" not in capsys.readouterr().err
    assert run("generate", "a lighthouse", "--params", "tiny", *common) == 0
    assert "never learned" in capsys.readouterr().err


def drawn(folder, tmp_path, *words, prompt=PROMPT) -> torch.Tensor:
    assert run("generate", prompt, "--params", folder, "--steps", 2, "--out", tmp_path / "x.png", *words) == 0
    return shown(tmp_path / "x.png")


@pytest.mark.parametrize(
    "words",
    [
        ("--cfg", 0),
        ("--cfg", 0.5),
        ("--cfg=-3",),
        ("--cfg", 1),
        ("--cfg", 0, "--guidance", "zero-star"),
        ("--guidance", "zero-star:scale=0"),
        ("--guidance", "apg:scale=0.5"),
        ("--cfg", 1, "--guidance", "tangential"),
        ("--cfg", 0, "--guidance", "mixed-apg:projected-scale=0"),
        ("--cfg", 0, "--offload"),
    ],
)
def test_a_scale_up_to_1_is_the_prompt_alone(folder, tmp_path, capsys, words):
    image = drawn(folder, tmp_path, *words, "--negative", "blue")
    assert torch.equal(image, drawn(folder, tmp_path, "--cfg", 1))
    assert not torch.equal(image, drawn(folder, tmp_path, *words, prompt="a blue star"))


def test_what_has_no_effect_is_noted_once(folder, tmp_path, capsys):
    def notes(*words) -> list[str]:
        capsys.readouterr()
        drawn(folder, tmp_path, *words)
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: -")]

    assert notes() == notes("--cfg", 1) == notes("--cfg", 4, "--negative", "blue") == []
    (note,) = notes("--cfg", 0, "--count", 2, "--batch", 1)
    assert "--cfg 0 is no guidance" in note and "as in diffusers" in note
    (note,) = notes("--cfg", 1, "--negative", "blue")
    assert "--negative has no effect" in note
    (note,) = notes("--cfg", 0, "--guidance", "zero-star", "--guidance", "rescaled")
    assert "--guidance zero-star at scale 0 is no guidance" in note and "what is added to it stays" in note
    # A prompt that is added is guided away from the negative one.
    (note,) = notes("--cfg", 0, "--negative", "blue", "--guidance", "prompt:text=a ring,weight=2")
    assert "--cfg 0" in note


def test_edit_and_likelihood_take_scales_so_too(folder, tmp_path, capsys):
    drawn(folder, tmp_path)
    source = tmp_path / "in.png"
    os.rename(tmp_path / "x.png", source)
    common = ("--params", folder, "--steps", 2)

    def edited(*words) -> torch.Tensor:
        to = ("--from", PROMPT, "--to", "a blue star", "--eta", 0.2, "--out", tmp_path / "y.png")
        assert run("edit", source, *to, *common, *words) == 0
        return shown(tmp_path / "y.png")

    assert torch.equal(edited("--cfg", 0, "--source-cfg", 0.3), edited("--cfg", 1, "--source-cfg", 1))
    assert "--source-cfg 0.3 is no guidance" in capsys.readouterr().err
    scores = []
    for scale in (1, 0):
        words = ("--prompt", PROMPT, "--prompt", "a blue star", "--probes", 1, "--json", tmp_path / "l.json")
        assert run("likelihood", source, *words, *common, "--cfg", scale) == 0
        scores.append([row["log_likelihood"] for row in json.loads((tmp_path / "l.json").read_text())["prompts"]])
    assert scores[0] == scores[1] and scores[0][0] != scores[0][1]
    assert "--cfg 0 is no guidance" in capsys.readouterr().err


def test_the_function_keeps_its_mathematics(folder):
    from functional_sd3 import guidance

    v, u = torch.randn(2, 1, 4, 2, 2)
    velocity = guidance.guided(guidance.cfg(0.25), {"positive": lambda x, t: v, "negative": lambda x, t: u})
    torch.testing.assert_close(velocity(v, torch.ones(1)), u + 0.25 * (v - u))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a (large red:1.3) circle", (), "(large red:1.3) is encoded as it is written; with --weighted"),
        ("a circle <lora:ink:0.8>", ("--weighted",), "a LoRA is given by --lora ink.safetensors=0.8"),
        ("a circle <lora:ink>", (), "--lora ink.safetensors=1"),
        ("a (large red:1.3) circle", ("--weighted",), None),
        ("a (red) circle: 3 (of 4: all)", (), None),
    ],
)
def test_notation_of_other_programs_is_noted_where_it_is_text(folder, tmp_path, capsys, prompt, options, message):
    words = (prompt, "--params", folder, "--steps", 1, *options, "--out", tmp_path / "x.png")
    assert run("generate", *words) == 0
    error = capsys.readouterr().err
    assert message in error if message else "as it is written" not in error
