"""docs/gallery.md: its images are those of its commands, are all made by its program, and are small.

That every command and program of the page runs, with few steps, is in test_commands.py and test_python.py.
"""

import importlib.util
import re
import shlex

import pytest
from PIL import Image

from functional_sd3.cli import parser
from tests.docs import markdown

PAGE = (markdown.ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
FOLDER = markdown.ROOT / "docs" / "gallery"


@pytest.fixture(scope="module")
def gallery():
    """The module docs/gallery.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("gallery", FOLDER.with_suffix(".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands(gallery) -> list[list[str]]:
    steps = [step for section in gallery.sections(PAGE).values() for step in section]
    return [shlex.split(text) for language, text in steps if language == "sh"]


def test_every_image_of_the_folder_is_shown_and_every_shown_one_is_made(gallery):
    shown = {image.removeprefix("gallery/") for image in gallery.images(PAGE)}
    assert shown == {path.name for path in FOLDER.iterdir()}
    made = set(re.findall(r"out/gallery/([\w-]+\.png)", PAGE))
    assert shown == made


def test_images_are_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 400_000


def test_every_image_was_made_by_the_command_that_stands_above_it(gallery):
    """By the prompts, steps, scale and method that the image's own metadata name."""
    checked = 0
    for words in commands(gallery):
        if words[1] == "train":
            continue
        given = parser.build().parse_args(words[1:])
        with Image.open(FOLDER / words[words.index("--out") + 1].rpartition("/")[2]) as image:
            said = image.info["functional_sd3"]
        for option in ("steps", "cfg", "seed", "count", "frames", "strength", "eta"):
            if f"--{option}" in words:
                assert f'"{option}": {getattr(given, option)}' in said, (words, option)
        for option in ("--method", "--negative", "--cache"):
            if option in words:
                assert f'"{option[2:]}": "{words[words.index(option) + 1]}"' in said, (words, option)
        assert words[2] in said or words[words.index("--to") + 1] in said
        checked += 1
    assert checked > 30
