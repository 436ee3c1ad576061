"""`--settings IMAGE`: a command line whose defaults are the settings of an image."""

import json
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from functional_sd3 import cli, weights
from functional_sd3.cli import image_settings, recorded
from tests import models

SETTINGS = {
    "prompts": ["a red circle", "-a blue star"],
    "seed": 3,
    "count": 2,
    "negative": "grey",
    "steps": 4,
    "cfg": 2.5,
    "guidance": ["zero-star", "rescaled:factor=0.7"],
    "params": ["tiny-4"],
    "weighted": True,
    "cache": "hold:every=2",
    "size": "64x32",
}


@pytest.fixture
def image(tmp_path):
    """(settings) -> an image with these in it."""

    def write(settings, name: str = "x.png"):
        info = PngInfo()
        info.add_itxt(image_settings.METADATA, json.dumps({"command": settings}))
        Image.new("RGB", (8, 8)).save(tmp_path / name, pnginfo=info)
        return str(tmp_path / name)

    return write


def options(*words):
    return recorded.parse([str(word) for word in words]).options


def test_all_settings_are_the_options(image):
    path = image(SETTINGS)
    read = vars(options("generate", "--settings", path))
    assert read.pop("prompt") == SETTINGS["prompts"] and read.pop("settings") == path and read["prompts"] is None
    assert {name: read[name] for name in SETTINGS if name != "prompts"} == {
        name: value for name, value in SETTINGS.items() if name != "prompts"
    }
    assert read["given"] == {"steps", "cfg"}
    usual = vars(options("generate", "x"))
    assert all(read[name] == value for name, value in usual.items() if name not in (*SETTINGS, "prompt", "settings"))


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (("--seed", 9), "seed", 9),
        (("a green ring",), "prompt", ["a green ring"]),
        (("--prompts", "more.txt"), "prompt", []),
        (("a", "--prompts", "more.txt"), "prompt", ["a"]),
        (("--guidance", "apg"), "guidance", ["apg"]),
        (("--params", "tiny"), "params", ["tiny"]),
        (("--cfg", 1), "cfg", 1),
        (("--lora", "a"), "lora", ["a"]),
        (("--fast",), "cache", None),
        (("--negative", ""), "negative", ""),
    ],
)
def test_what_is_given_takes_the_place_of_what_is_recorded(image, words, name, value):
    path = image(SETTINGS)
    unchanged = vars(options("generate", "--settings", path))
    read = vars(options("generate", *words, "--settings", path))
    assert read[name] == value
    aside = (name, "prompts", "fast")
    assert all(read[other] == each for other, each in unchanged.items() if other not in aside)


def test_the_image_is_drawn_again_and_with_one_thing_changed(tmp_path):
    weights.save(tmp_path / "model", models.random_model())
    words = ["a", "b", "--seed", 3, "--steps", 2, "--cfg", 3, "--guidance", "cfg", "--guidance", "rescaled:factor=0.5"]
    paths = {name: str(tmp_path / f"{name}.png") for name in ("first", "again", "other", "same")}
    draw = lambda *words: cli.main(["generate", *map(str, words)])  # noqa: E731
    assert draw(*words, "--params", tmp_path / "model", "--out", paths["first"]) == 0
    assert draw("--settings", paths["first"], "--out", paths["again"]) == 0
    assert draw("--settings", paths["first"], "--seed", 4, "--out", paths["other"]) == 0
    assert draw("--settings", paths["other"], "--seed", 3, "--out", paths["same"]) == 0
    content = {name: Path(path).read_bytes() for name, path in paths.items()}
    assert content["first"] == content["again"] == content["same"] != content["other"]


def test_look_takes_the_settings_of_one_image(image):
    read = options("look", "--settings", image({**SETTINGS, "prompts": ["a red circle"]}))
    assert (read.prompt, read.seed, read.count, read.steps) == ("a red circle", 3, 1, 4)
    several = image(SETTINGS, "several.png")
    assert options("look", "a ring", "--settings", several).prompt == "a ring"
    with pytest.raises(ValueError, match="several.png shows images of 2 prompts: give the PROMPT of one"):
        options("look", "--settings", several)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subcommand": "edit", "picture": "a.png"}, "was drawn by edit, and settings are taken from images"),
        ({"prompts": ["a"], "out": "/etc/x.png"}, "settings that are not this program's: 'out' is no option"),
        ({"prompts": ["a"], "settings": "y.png"}, "'settings' is no option that generate records"),
        ({"prompts": ["a"], "steps": "many"}, "'many' is no value of --steps"),
        ({"prompts": []}, "their prompts are no list of texts"),
    ],
)  # fmt: skip
def test_settings_that_are_no_command_line_are_refused(image, capsys, settings, message):
    assert cli.main(["generate", "--settings", image(settings)]) == 1
    error = capsys.readouterr().err
    assert message in error and "--settings" in error and error.count("\n") == 1


def test_files_without_settings_are_named(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no image")
    for name, message in (("plain", "without the settings of"), ("text", "not a readable image"), ("gone", "no file")):
        path = tmp_path / f"{name}.png"
        assert cli.main(["generate", "--settings", str(path)]) == 1
        error = capsys.readouterr().err
        assert f"--settings {path}" in error and message in error
