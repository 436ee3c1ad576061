"""Options that `train`, `reward` and `distill` share: each described once, each command with its own defaults."""

import argparse
from typing import Any

from functional_sd3.cli import report
from functional_sd3.cli.distilled import Given

REQUIRED = object()
"""The default of an option that a command needs."""
_DESCRIBED: dict[str, dict[str, Any]] = {
    "--out": {"required": True, "metavar": "DIR", "help": "folder for the result, its log and checkpoints"},
    "--data": {"metavar": "DIR|shapes", "help": "folder of images, or the built-in shapes"},
    "--lora": {
        "type": int,
        "metavar": "RANK",
        "help": "train a LoRA of the attentions, and leave it in --out as a file",
    },
    "--resume": {"action": "store_true", "help": "go on from the last checkpoint in --out, to the same bits"},
    "--force": {
        "action": "store_true",
        "help": "with --resume: go on although options, weights or what is learned from are others now",
    },
    "--size": {"type": int, "help": "side of the images in pixels (default: the model's own)"},
    "--template": {"action": Given, "help": "caption of a class folder"},
    "--caption": {"metavar": "TEXT", "help": "the caption of every image of --data, in place of any that it has"},
    "--follow": {"action": "store_true", "help": "read what links and metadata name outside of --data too"},
    "--pictures": {"type": int, "action": Given, "help": "how many of the shapes"},
    "--steps": {"type": int, "help": "steps in all, those before --resume included"},
    "--batch-size": {"type": int, "help": "images a step"},
    "--lr": {"type": float, "help": "peak learning rate"},
    "--warmup": {"type": int, "help": "steps up to the peak"},
    "--ema": {"type": float, "help": "decay of the averaged parameters, which are the result"},
    "--seed": {"type": int, "default": 0, "help": "of the data, the order and the noise"},
    "--accumulate": {"type": int, "default": 1, "help": "parts that a batch is taken in, to save memory"},
    "--device": {"default": "auto", "help": "auto, cpu, cuda or mps"},
    "--save-every": {"type": int, "help": "steps between checkpoints"},
    "--log-every": {"type": int, "help": "steps between rows of log.csv"},
    "--sample-every": {"type": int, "help": "steps between sample images, 0 for none"},
    "--result-every": {
        "type": int,
        "default": 0,
        "metavar": "N",
        "help": "keep the result as it is every N steps too, in OUT/results/STEP; 0 for the last alone",
    },
}


def add(group: argparse._ActionsContainer, **defaults: Any) -> None:
    """Add options by name in the order given, each with the command's own default; None: that of the description.

    Help texts end with the default where there is one.
    """
    for name, default in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        described = {**_DESCRIBED[flag]}
        if default is REQUIRED:
            described["required"] = True
        elif default is not None:
            described["default"] = default
        value = described.get("default")
        if value is not None and value != "auto":
            shown = value if isinstance(value, str) else f"{value:g}"
            described["help"] += f" (default {shown})"
        group.add_argument(flag, **described)


def add_images(group: argparse._ActionsContainer, *, pictures: int) -> None:
    """Options of the images that a model learns from, and of their captions."""
    add(group, size=None, template="a photo of a {}", caption=None, follow=None, pictures=pictures)


def check_images(arguments: argparse.Namespace) -> None:
    """Raises ValueError for an option of captions with the shapes; notes one of the shapes with a folder."""
    given = {*getattr(arguments, "given", ()), *(name for name in ("caption", "follow") if getattr(arguments, name))}
    if arguments.data == "shapes":
        for name in ("template", "caption", "follow"):
            if name in given:
                raise ValueError(f"--{name} is for a folder of images: --data shapes has captions of its own")
    elif "pictures" in given:
        report.note(f"--pictures {arguments.pictures} is how many of the shapes: of --data {arguments.data} all images "
                    "are read")  # fmt: skip
