"""Options of `train`, `reward` and `distill` that change the memory of a run and not what it computes."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from functional_sd3.weights.model import Model

NAMES = ("remat",)
"""The options, all of which a checkpoint keeps."""


def add_arguments(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    add = group.add_argument
    add("--remat", action="store_true", help="compute blocks again in the backward pass instead of keeping activations")


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for an option that would have no effect, or none with another."""
    if arguments.remat and getattr(arguments, "part", "transformer") == "vae":
        raise ValueError("--remat computes blocks of the transformer again: it belongs to --part transformer")
    if arguments.remat and getattr(arguments, "compile", False):
        raise ValueError(
            "--remat has no effect with --compile, whose compiler decides itself what it keeps: leave out one"
        )


def with_computations(arguments: argparse.Namespace, model: "Model", trained: tuple[str, ...]) -> "Model":
    """The model with a config that says how the blocks of its components are computed; trained: those that learn."""
    from functional_sd3.core import transform
    from functional_sd3.core.computation import Computation

    if not arguments.remat:
        return model
    computations = {name: Computation(block_transform=transform.remat) for name in trained}
    return model._replace(config=replace(model.config, computations={**model.config.computations, **computations}))
