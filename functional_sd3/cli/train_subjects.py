"""Options of `train` on ControlNets, new words, prior preservation and masks."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from functional_sd3.cli import numbers, view_options
from functional_sd3.formats.printable import shorten

if TYPE_CHECKING:
    from functional_sd3.training.flow_learners import Inversion

KINDS = ("blur", "canny", "depth", "pose", "tile", "inpaint")
"""`controlnet.KINDS`, known here without torch."""
_DRAWN = "canny"
"""The kind whose control images are computed from the images themselves."""
_OTHERS = {"control": "trains a ControlNet beside a frozen model", "inversion": "trains a word's vectors"}
_WITH: dict[str, tuple[str, ...]] = {"control": (), "inversion": ("lora",)}
"""Further parts that may learn with these."""
_BELONGS = {
    "control": ("control_data", "control_depth", "canny"),
    "inversion": ("initial_word", "vectors", "inversion_t5", "word_lr"),
    "masks": ("mask_outside",),
}
"""Option -> those that mean something with it alone."""


def add_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--control", choices=KINDS, metavar="KIND", help="train a ControlNet for images of this kind: canny, depth, ..."
    )
    add("--control-data", metavar="DIR", help="its control images, of the names of those of --data (default: for canny "
        "the edges of the images)")  # fmt: skip
    add("--control-depth", type=int, metavar="N", help="its blocks, copied from the transformer's first (default half)")
    add("--canny", metavar="LOW,HIGH", help="thresholds of the edges (default 100,200)")
    add(
        "--inversion",
        metavar="WORD",
        help="learn a new word: embedding vectors of CLIP-L and CLIP-G, alone or with --lora",
    )
    add("--initial-word", metavar="TEXT", help="what the word starts from, such as the name of its class")
    add("--vectors", type=int, metavar="N", help="vectors of the word, each a token of a prompt (default 1)")
    add("--word-lr", type=float, metavar="LR", help="peak learning rate of the vectors, with --lora (default --lr)")
    add("--inversion-t5", action="store_true", help="the word gets vectors of T5 too")
    add("--prior-data", metavar="DIR", help="images of the class that are learned beside those of --data (DreamBooth)")
    add("--prior-prompt", metavar="TEXT", help="their caption, and the prompt of those that are drawn")
    add(
        "--prior-images",
        type=int,
        metavar="N",
        help="draw as many, or what --prior-data lacks of them, before training",
    )
    add("--prior-weight", type=float, metavar="W", help="of their loss (default 1)")
    add("--masks", metavar="DIR", help="a mask for each image, of the same name: white is learned, black is not")
    add("--mask-outside", type=float, metavar="W", help="weight of the loss where masks are black (default 0)")


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together, and for folders that are not there."""
    for owner, names in _BELONGS.items():
        for name in names:
            if _given(arguments, name) and not _given(arguments, owner):
                raise ValueError(f"{_flag(name)} belongs to {_flag(owner)}, which is not given")
    if arguments.part == "vae":
        names = (
            "control",
            "inversion",
            "prior_data",
            "prior_images",
            "prior_prompt",
            "prior_weight",
            "masks",
            "validation",
        )
        for name in (each for each in names if _given(arguments, each)):
            raise ValueError(f"{_flag(name)} belongs to --part transformer")
    for owner, why in _OTHERS.items():
        others = (
            "scratch",
            "text_encoders",
            *(name for name in ("lora", *_OTHERS) if name not in (owner, *_WITH[owner])),
        )
        for name in (each for each in others if _given(arguments, owner) and _given(arguments, each)):
            raise ValueError(f"{_flag(owner)} {why}, so {_flag(name)} does not go with it; train one, then the other")
    if view_options.has_views(arguments):
        named = ("prior_data", "prior_images")
        for name in (each for each in named if _given(arguments, each)):
            raise ValueError(f"{_flag(name)} is of images cut to one square; leave out --buckets, --crops and --flips")
        if arguments.validation is not None and not arguments.validation.isdecimal():
            raise ValueError("--validation DIR is of one size: with --buckets, --crops or --flips give a number")
    _check_control(arguments)
    _check_inversion(arguments)
    _check_prior(arguments)
    if arguments.masks and arguments.data == "shapes":
        raise ValueError("--masks is for a folder of images: the shapes have no files that masks could lie beside")
    for name in ("masks", "control_data"):
        folder = getattr(arguments, name)
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{_flag(name)} {folder} is not a folder that exists; name the one with its images")


def thresholds(arguments: argparse.Namespace) -> tuple[int, int]:
    """LOW and HIGH of --canny."""
    text = arguments.canny or "100,200"
    low, comma, high = text.partition(",")
    values = [numbers.number(part, f"--canny {shorten(repr(text))}: its threshold") for part in (low, high) if comma]
    if not comma or not all(value == int(value) for value in values) or not 0 <= values[0] <= values[1] <= 2**15:
        raise ValueError(f"--canny {shorten(repr(text))} must be LOW,HIGH: whole numbers with 0 <= LOW <= HIGH")
    return int(values[0]), int(values[1])


def inversion(arguments: argparse.Namespace) -> "Inversion | None":
    """The word of --inversion."""
    from functional_sd3.training.flow_learners import Inversion

    if arguments.inversion is None:
        return None
    encoders = ("clip_l", "clip_g", "t5") if arguments.inversion_t5 else ("clip_l", "clip_g")
    return Inversion(arguments.inversion, arguments.initial_word, arguments.vectors or 1, encoders)


def _check_control(arguments: argparse.Namespace) -> None:
    if arguments.control is None:
        return
    thresholds(arguments)
    if arguments.control_data is None and arguments.control != _DRAWN:
        raise ValueError(
            f"--control {arguments.control} needs --control-data DIR, its control images; of {_DRAWN} they are computed"
        )
    if arguments.canny is not None and (arguments.control != _DRAWN or arguments.control_data is not None):
        raise ValueError("--canny is for edges that are computed: --control canny without --control-data")
    if arguments.control_data is not None and arguments.data == "shapes":
        raise ValueError("--control-data is for a folder of images: the shapes have no files it could name")
    if arguments.control == "inpaint":
        raise ValueError("--control inpaint is not trained here: its ControlNets read a mask as a channel more")
    if any(_given(arguments, name) for name in ("prior_data", "prior_images")):
        raise ValueError("--control learns no subject, so --prior-data and --prior-images do not go with it")


def _check_inversion(arguments: argparse.Namespace) -> None:
    word = arguments.inversion
    if word is None:
        return
    if not word.strip() or word != word.strip() or not word.isprintable():
        raise ValueError(
            f"--inversion {shorten(repr(word))} must be a word, such as '<mine>', without white space around"
        )
    if arguments.word_lr is not None and not arguments.lora:
        raise ValueError("--word-lr is for --inversion with --lora; of a word alone --lr is the rate")
    if arguments.word_lr is not None and not 0 < arguments.word_lr < math.inf:
        raise ValueError(f"--word-lr {arguments.word_lr} must be a positive number, such as 1e-3")
    if not (arguments.initial_word or "").strip():
        raise ValueError(f"--inversion {shorten(repr(word))} needs --initial-word TEXT, such as the name of its class")


def _check_prior(arguments: argparse.Namespace) -> None:
    data, prompt, images = arguments.prior_data, arguments.prior_prompt, arguments.prior_images
    if images is not None and prompt is None:
        raise ValueError("--prior-images needs --prior-prompt TEXT, of which the images are drawn")
    if data is None and images is None:
        for name in (each for each in ("prior_prompt", "prior_weight") if _given(arguments, each)):
            raise ValueError(
                f"{_flag(name)} needs images of the class: --prior-data DIR, or --prior-images N to draw them"
            )
    if data is not None and images is None and not Path(data).is_dir():
        raise ValueError(f"--prior-data {data} is not a folder that exists; --prior-images N draws images into it")
    if data is not None and Path(data).exists() and not Path(data).is_dir():
        raise ValueError(f"--prior-data {data} is a file; name a folder of images")


def _given(arguments: argparse.Namespace, name: str) -> bool:
    return getattr(arguments, name) not in (None, False)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
