"""`--variant`, which messages about folders advise: every command that reads a model takes it."""

import argparse

import pytest
import torch
from PIL import Image

from functional_sd3 import cli, weights
from functional_sd3.cli import parser
from tests.models import random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as people download of the half-precision files alone."""
    folder = tmp_path_factory.mktemp("variant") / "model"
    weights.save(folder, random_model(), dtype=torch.float16)
    for path in [*folder.rglob("*.safetensors")]:
        path.rename(path.with_name(path.stem + ".fp16.safetensors"))
    Image.new("RGB", (64, 64), "red").save(folder.parent / "image.png")
    return folder


def commands(folder, out):
    image = str(folder.parent / "image.png")
    return {
        "generate": ["a", "--steps", "1", "--params", folder, "--out", out / "g.png"],
        "generate offloaded": ["a", "--steps", "1", "--params", folder, "--out", out / "g.png", "--offload"],
        "likelihood": [image, "--prompt", "a", "--by", "loss", "--draws", "1", "--params", folder],
        "inspect": [folder, "--quick"],
        "inspect against": [folder, "--against", folder],
        "convert": [folder, out / "c.safetensors", "--layout", "single"],
        "merge": [folder, folder, "--out", out / "m"],
        "quantize": [folder, "--steps", "0"],
        "train": ["--data", "shapes", "--out", out / "t", "--params", folder, "--steps", "1", "--pictures", "4",
                  "--batch-size", "2", "--sample-every", "0", "--part", "vae"],
    }  # fmt: skip


def test_the_message_names_it_and_with_it_every_command_reads_the_folder(folder, tmp_path, capsys):
    for title, words in commands(folder, tmp_path).items():
        command = [title.split()[0], *map(str, words)]
        assert cli.main(command) == 1, title
        assert "there are variants, ask for variant='fp16' (--variant fp16)" in capsys.readouterr().err
        assert cli.main([*command, "--variant", "fp16"]) == 0, (title, capsys.readouterr().err)
        capsys.readouterr()


def test_every_command_with_a_model_has_the_option():
    without = set()
    for name in parser.SUBCOMMANDS:
        for words in _parsers(parser, name):
            options = {option for action in words._actions for option in action.option_strings}
            reads = options & {"--params", "--layout", "--against", "--base", "--format"}
            if reads and "--variant" not in options:
                without.add(words.prog)
    assert not without


def _parsers(module, name):
    import importlib

    root = argparse.ArgumentParser(name)
    importlib.import_module(f"functional_sd3.cli.{name}").add_arguments(root)
    nested = [action for action in root._actions if isinstance(action, argparse._SubParsersAction)]
    return [sub for action in nested for sub in action.choices.values()] or [root]
