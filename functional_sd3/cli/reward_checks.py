"""Checks of a `reward` command line, before anything is loaded."""

import argparse
import math

from functional_sd3.cli import memory_options, numbers, options, output
from functional_sd3.cli.parser import suggestion
from functional_sd3.formats.printable import shorten
from functional_sd3.training.distill_options import listed

_SHAPES = ("shapes", "colours")
_AT_TIMES = ("nft", "awm", "dpo")
"""Methods that learn from each image at --times."""


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for an option, or options together, that make no sense, and for files that are not there."""
    group, batch = arguments.group, arguments.batch_size
    if group < 2:
        raise ValueError(f"--group {group} must be at least 2: an image is compared with others of its prompt")
    if group > batch:
        raise ValueError(f"--group {group} is larger than --batch-size {batch}: an update learns from whole groups")
    if batch % group:
        raise ValueError(f"--batch-size {batch} must be a multiple of --group {group}, the images of a prompt")
    _check_methods(arguments)
    if arguments.sampling_steps is not None:
        check_sampling(arguments)
    if arguments.beta is not None and not 0 < arguments.beta < math.inf:
        raise ValueError(f"--beta {arguments.beta} must be a positive number")
    if arguments.kl is not None and not 0 <= arguments.kl < math.inf:
        raise ValueError(f"--kl {arguments.kl} must be at least 0")
    if arguments.force and not arguments.resume:
        raise ValueError("--force is for --resume: it lets a run go on with other options, weights or rewards")
    _check_pairs(arguments)
    _check_rewards(arguments)
    weights(arguments)
    options.check_method(arguments.sampler)
    if arguments.sampler in options.ADAPTIVE:
        raise ValueError(f"--sampler {arguments.sampler} chooses its own steps; a run learns from the times of a grid")
    memory_options.check(arguments)
    options.check_params(arguments.params)
    if arguments.prompts is not None:
        options.check_file(arguments.prompts, f"--prompts {shorten(arguments.prompts, 300)}")
    output.check_folder(arguments.out)


def _check_methods(arguments: argparse.Namespace) -> None:
    """Raises ValueError for an option of another method."""
    method, given = arguments.method, getattr(arguments, "given", ())
    of = {"beta": ("nft", "dpo"), "form": ("grpo",), "noise": ("grpo",), "window": ("grpo",), "eps": ("grpo", "awm")}
    for name, methods in {**of, "last": ("draft",)}.items():
        if getattr(arguments, name) is not None and method not in methods:
            raise ValueError(f"--{name} is for --method {listed(methods)}, not for {method}")
    if method in ("grpo", "draft") and "times" in given:
        raise ValueError(f"--times is for --method {listed(_AT_TIMES)}, not for {method}")
    if method in ("grpo", "draft") and arguments.sampler not in (None, "euler"):
        raise ValueError(f"--method {method} follows steps of its own: leave out --sampler {arguments.sampler}")
    if method == "draft" and arguments.updates > 1:
        raise ValueError("--updates is not for --method draft, which draws its images anew in every update")


def check_sampling(arguments: argparse.Namespace) -> None:
    """Raises ValueError for fewer --sampling-steps than the method needs."""
    method, steps = arguments.method, arguments.sampling_steps
    if method in _AT_TIMES and arguments.times > steps:
        raise ValueError(f"--times {arguments.times} must be at most --sampling-steps {steps}")
    if method == "grpo" and steps < 2:
        raise ValueError("--method grpo needs --sampling-steps of at least 2: the last step is not trained on")
    if method == "draft" and arguments.last is not None and arguments.last > steps:
        raise ValueError(f"--last {arguments.last} must be at most --sampling-steps {steps}")


def weights(arguments: argparse.Namespace) -> dict[str, float]:
    """The weights of --weight by the name of a score. Raises ValueError for what is no NAME=NUMBER."""
    given: dict[str, float] = {}
    for text in arguments.weight:
        name, equals, number = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--weight {shorten(repr(text))} must be NAME=NUMBER, such as right=1")
        if name in given:
            raise ValueError(f"--weight {shorten(name)} is given twice")
        given[name] = numbers.number(number, f"--weight {shorten(name)}")
    if given and not any(given.values()):
        raise ValueError("--weight: all weights are 0, so there is nothing to learn from")
    return given


def _check_pairs(arguments: argparse.Namespace) -> None:
    if arguments.pairs is None:
        if not arguments.reward:
            raise ValueError("--reward says what images are rewarded by, such as --reward shapes; of dpo, --pairs FILE")
        return
    if arguments.method != "dpo":
        raise ValueError(f"--pairs is for --method dpo, not for {arguments.method}")
    for name in ("reward", "weight", "prompts", "things"):
        if getattr(arguments, name):
            raise ValueError(f"--pairs says what is learned and of which prompts: leave out --{name}")
    if arguments.batch_size % 2:
        raise ValueError(f"--batch-size {arguments.batch_size} must be even: a pair is two images")
    options.check_file(arguments.pairs, f"--pairs {shorten(arguments.pairs, 300)}")


def _check_rewards(arguments: argparse.Namespace) -> None:
    seen = set()
    for name in arguments.reward:
        kind = name.partition(":")[0]
        if name in seen:
            raise ValueError(f"--reward {shorten(name)} is given twice; --weight says how much a score counts")
        seen.add(name)
        if name in _SHAPES:
            if arguments.prompts is not None:
                raise ValueError(
                    f"--reward {name} reads captions of the shapes, which it draws itself: leave out --prompts"
                )
        elif name == "clip":
            if arguments.clip is None:
                raise ValueError("--reward clip needs --clip DIR, a folder of transformers' CLIPModel")
        elif kind == "psnr" and name != kind:
            options.check_file(name.partition(":")[2], f"--reward {shorten(name, 300)}: the target")
        elif ":" not in name:
            near = suggestion(name, [*_SHAPES, "clip"])
            raise ValueError(
                f"--reward {shorten(repr(name))} must be shapes, colours, clip, psnr:FILE or module:function{near}"
            )
    if arguments.clip is not None and "clip" not in arguments.reward:
        raise ValueError("--clip is for --reward clip")
    if arguments.things is not None and arguments.prompts is not None:
        raise ValueError("--things is for captions of the shapes: --prompts has its own")
