"""The command line as a person meets it: images, settings that make them again, messages instead of tracebacks."""

import json

import pytest
import torch
from PIL import Image

from functional_sd3 import cli
from functional_sd3.cli import image_settings
from functional_sd3.core import transform
from functional_sd3.transformer import joint_block

PROMPT = "a large red circle on a white background"


def pixels_of(path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.tensor(list(image.tobytes()))


def size_and_settings(path):
    with Image.open(path) as image:
        return image.size, json.loads(image.info[image_settings.METADATA])["command"]


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def test_a_prompt_becomes_an_image_whose_settings_make_it_again(folder, tmp_path, capsys):
    first = tmp_path / "one.png"
    assert run("generate", PROMPT, "--params", folder, "--steps", 2, "--seed", 5, "--out", first) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(first) and "sampling" in err and "load" in err
    assert size_and_settings(first)[0] == (64, 64)
    assert run("inspect", first) == 0
    command = capsys.readouterr().out.strip().splitlines()[-1]
    import shlex

    words = shlex.split(command)
    assert words[:2] == ["functional-sd3", "generate"]
    again = tmp_path / "again.png"
    assert run(*words[1:], "--out", again) == 0
    assert torch.equal(pixels_of(first), pixels_of(again))


def test_an_image_of_a_series_is_made_again_alone(folder, tmp_path, capsys):
    common = ("--params", folder, "--steps", 2)
    assert run("generate", PROMPT, "a blue star", *common, "--count", 3, "--seed", 7, "--out", tmp_path / "all") == 0
    files = [line for line in capsys.readouterr().out.splitlines()]
    assert len(files) == 7 and files[-1].endswith("grid.png")
    settings = image_settings.read_record(files[4])["command"]
    assert settings["seed"] == 8 and settings["prompts"] == ["a blue star"]
    assert run("generate", "a blue star", *common, "--seed", 8, "--out", tmp_path / "alone.png") == 0
    one, other = (pixels_of(path) for path in (files[4], tmp_path / "alone.png"))
    assert (one - other).abs().max() <= 1


def test_earlier_images_are_never_overwritten(folder, tmp_path, capsys):
    for _ in range(2):
        assert run("generate", PROMPT, "--params", folder, "--steps", 1, "--out", tmp_path / "out") == 0
    assert len(set(capsys.readouterr().out.split())) == 2


def test_blocks_are_compiled_where_that_is_asked_for(folder, tmp_path, monkeypatch, capsys):
    compiled = []

    def mark(apply):
        compiled.append(apply)
        return apply

    monkeypatch.setattr(transform, "compile", mark)
    common = ("generate", PROMPT, "--params", folder, "--steps", 1)
    assert run(*common, "--out", tmp_path / "plain.png") == 0 and not compiled
    assert run(*common, "--compile", "--out", tmp_path / "compiled.png") == 0
    assert set(compiled) == {joint_block.apply}
    assert torch.equal(pixels_of(tmp_path / "plain.png"), pixels_of(tmp_path / "compiled.png"))
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    capsys.readouterr()
    assert run(*common, "--compile", "--out", tmp_path / "never.png") == 1
    assert "compiling needs the C++ compiler no-such-compiler" in capsys.readouterr().err


def test_prompts_come_from_a_file_and_sizes_from_the_command_line(folder, tmp_path, capsys):
    listed = tmp_path / "prompts.txt"
    listed.write_text("a red circle\n\n  a blue star  \n", encoding="utf-8")
    out = tmp_path / "grid.png"
    assert run("generate", "--prompts", listed, "--params", folder, "--steps", 1, "--size", "96x80", "--out", out) == 0
    size, settings = size_and_settings(out)
    assert size == (2 * 96 + 2, 80) and settings["prompts"] == ["a red circle", "a blue star"]


@pytest.mark.parametrize("prompt", ["", "red " * 2500], ids=["empty", "10,000 characters"])
def test_empty_and_endless_prompts_give_images(folder, tmp_path, capsys, prompt):
    assert run("generate", prompt, "--params", folder, "--steps", 1, "--out", tmp_path / "p.png") == 0
    assert ("note: CLIP reads 24 of the" in capsys.readouterr().err) == (len(prompt) > 100)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no prompt; try"),
        ((PROMPT, "--size", "63x64"), "width 63 is not a multiple of 16; nearest are 48 and 64"),
        ((PROMPT, "--size", "large"), "--size 'large' must be WIDTHxHEIGHT"),
        ((PROMPT, "--steps", 0), "--steps 0 must be at least 1"),
        ((PROMPT, "--count", -1), "--count -1 must be at least 1"),
        ((PROMPT, "--method", "magic"), "--method 'magic' must be one of euler"),
        ((PROMPT, "--device", "abacus"), "--device 'abacus' must be"),
        ((PROMPT, "--prompts", "/nowhere.txt"), "No such file or directory: --prompts /nowhere.txt"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, tmp_path, capsys, words, message):
    assert run("generate", "--params", folder, "--out", tmp_path / "p.png", *words) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_empty_folder_is_named(tmp_path, capsys):
    assert run("generate", PROMPT, "--params", tmp_path / "none", "--out", tmp_path / "p.png") == 1
    assert "none" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run("generate", PROMPT, "--params", tmp_path / "empty", "--out", tmp_path / "p.png") == 1
    assert "model_index.json" in capsys.readouterr().err


def test_an_out_that_cannot_be_written_is_said_before_the_work(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("generate", PROMPT, "--params", folder, "--out", tmp_path / "file" / "p.png") == 1
    error = capsys.readouterr().err
    assert "file" in error and "sampling" not in error


def test_a_full_disk_is_a_message_and_leaves_no_half_image(folder, tmp_path, capsys, monkeypatch):
    from functional_sd3.formats import files

    def full(*arguments, **options):
        raise OSError(28, "No space left on device", "p.png")

    monkeypatch.setattr(files, "write_atomic", full)
    assert run("generate", PROMPT, "--params", folder, "--steps", 1, "--out", tmp_path / "p.png") == 1
    assert "No space left on device" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_quietly(folder, tmp_path, capsys, monkeypatch):
    from functional_sd3 import pipeline

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "sample_latents", interrupted)
    assert run("generate", PROMPT, "--params", folder, "--out", tmp_path / "p.png") == 130
    assert capsys.readouterr().err.strip().endswith("stopped")


def test_inspect_counts_every_component(folder, capsys):
    assert run("inspect", folder) == 0
    text = capsys.readouterr().out
    for word in ("clip_l", "clip_g", "t5", "transformer", "vae", "tokenizer of t5", "schedule", "in all"):
        assert word in text


def test_an_empty_path_is_not_the_folder_here(capsys):
    assert run("inspect", "") == 1
    assert "PATH is empty; . is this folder" in capsys.readouterr().err


def test_inspect_says_what_is_no_image_of_ours(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    assert run("inspect", tmp_path / "plain.png") == 1
    assert "without the settings" in capsys.readouterr().err
    (tmp_path / "text.png").write_text("hello")
    assert run("inspect", tmp_path / "text.png") == 1
    assert "not a readable image" in capsys.readouterr().err
    assert run("inspect", tmp_path / "none.png") == 1
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--params", "sd3.5-large", "--lora", "x", "--seed", "3"], "what --lora may need is not in these numbers"),
        (["--params", "sd3.5-larg"], "--estimate knows sd3-medium, sd3.5-medium, sd3.5-large by name"),
    ],
    ids=str,
)
def test_an_estimate_names_what_it_does_not_count_or_know(words, said, capsys):
    cli.main(["generate", "--estimate", *words])
    assert said in capsys.readouterr().err
