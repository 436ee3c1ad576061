"""Caches on the command line: `--cache KIND[:OPTION=VALUE,...]`, and `--fast`, which is one of them."""

import argparse

from functional_sd3.cli import report
from functional_sd3.cli.parser import suggestion
from functional_sd3.flow import caches
from functional_sd3.flow.caches import Cache

_UNCACHED = {
    "direct": "--direct draws new noise in every step, so no velocity says anything of the next",
    "exact": "--exact solves each step for its start, which needs the velocities of all",
}
_SEVERAL = ("region", "tile", "mesh")
"""Options with which one evaluation of one process does not see all blocks."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        metavar="KIND[:OPTION=VALUE,...]",
        help="leave out evaluations of the transformer: extrapolate:every=2, hold, adaptive:tolerance=0.05, "
        "first-block:threshold=0.1 or teacache:threshold=0.15 (docs/sampling.md has what each costs and saves; "
        "default: every step is computed)",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help=f"half of the evaluations, left out where they say least: --cache {caches.write(caches.FAST)}",
    )


def check(arguments: argparse.Namespace, adaptive: tuple[str, ...]) -> None:
    """Put the words of --fast into --cache; raise ValueError for words and options that make no sense together.

    adaptive: the names of methods that choose their own steps.
    """
    flag = "--fast" if getattr(arguments, "fast", False) else "--cache"
    if getattr(arguments, "cache", None) is None and flag == "--cache":
        return
    if flag == "--fast":
        if arguments.cache is not None:
            raise ValueError(f"--fast is --cache {caches.write(caches.FAST)}: leave out one of --fast and --cache")
        arguments.cache = caches.write(caches.FAST)
    cache = parse(arguments.cache)
    if arguments.method in adaptive:
        raise ValueError(
            f"{flag} leaves out velocities, by whose errors --method {arguments.method} chooses its steps: take a "
            "method of fixed steps, such as euler, or a looser --rtol"
        )
    _check_mean(arguments.method, flag)
    for option, reason in _UNCACHED.items():
        if getattr(arguments, option, False):
            raise ValueError(f"{flag} cannot be used here: {reason}")
    several = [f"--{option}" for option in _SEVERAL if getattr(arguments, option, None)]
    if caches.is_of_blocks(cache) and several:
        raise ValueError(
            f"{flag} {arguments.cache} is of one network's blocks in one process, and {several[0]} evaluates several: "
            "take extrapolate, hold or adaptive"
        )


def check_steps(arguments: argparse.Namespace, method: str, *, is_student: bool) -> None:
    """Raises ValueError for a model whose method has no steps to leave out; notes a cache that leaves out none.

    method: the method of the run, after the model's defaults, as --steps. is_student: True for a
    model that was distilled to few steps.
    """
    if getattr(arguments, "cache", None) is None:
        return
    _check_mean(method, f"--cache {arguments.cache}")
    if is_student:
        raise ValueError(
            f"--cache {arguments.cache}: the model was distilled to {arguments.steps} steps, each of which counts: "
            "leave out --cache and --fast, or take fewer --steps that it was trained for"
        )
    if all(caches.computed_steps(parse(arguments.cache), arguments.steps)):
        report.note(f"--cache {arguments.cache} leaves out none of {arguments.steps} steps")


def _check_mean(method: str | None, flag: str) -> None:
    if method == "meanflow":
        raise ValueError(
            f"{flag} cannot be used here: --method meanflow takes few steps of a mean velocity, each over an interval "
            "of its own"
        )


def parse(text: str) -> Cache:
    """The cache of the words of --cache."""
    try:
        return caches.parse(text)
    except ValueError as error:
        near = suggestion(text.partition(":")[0], caches.KINDS) if "must be one of" in str(error) else ""
        raise ValueError(f"--cache {text!r}: {error}{near}") from None
