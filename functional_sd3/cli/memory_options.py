"""Options of `train`, `reward` and `distill` for less memory: how blocks are computed and parameters are updated."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from functional_sd3.parallel.mesh import Mesh
    from functional_sd3.training.update_rule import UpdateRule
    from functional_sd3.weights.model import Model

OPTIMIZERS = ("adamw", "adamw8bit", "muon")
"""Names of `training.update_rule.OPTIMIZERS`, known here without torch."""
NAMES = ("remat", "optimizer", "weights")
"""The options of every command, all of which a checkpoint keeps."""


def add_arguments(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Options of `train`, `reward` and `distill`."""
    add = group.add_argument
    add("--remat", action="store_true", help="compute blocks again in the backward pass instead of keeping activations")
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        help="adamw, adamw8bit (moments of one byte a number) or muon for matrices of blocks (default adamw)",
    )
    learned = "of the parameters that learn; bfloat16 ones are rounded stochastically (default float32)"
    add("--weights", choices=("float32", "bfloat16"), default="float32", help=learned)


class _Estimate(argparse.Action):
    """--estimate, without which nothing is trained, so that no data and no folder for a result are needed."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, True)
        for action in parser._actions:
            if action.dest in ("data", "out"):
                action.required = False


def add_full_arguments(group: argparse._ArgumentGroup) -> None:
    """Options of `train` alone."""
    add = group.add_argument
    add(
        "--fused-update",
        action="store_true",
        help="update each parameter in the backward pass, so that gradients take no memory; without clipping",
    )
    add("--base", choices=("int8", "float8"), help="of --lora: weights of the base in one byte each, with --remat")
    add(
        "--estimate", action=_Estimate, nargs=0, default=False, help="print the memory that this and other choices need"
    )
    swap = "of --lora: the last N blocks of the base stay on the host (on a CPU in their file), with --remat"
    add("--block-swap", type=int, metavar="N", help=swap)


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for an option that would have no effect, or that another excludes."""
    if arguments.remat and getattr(arguments, "part", "transformer") == "vae":
        raise ValueError("--remat computes blocks of the transformer again: it belongs to --part transformer")
    if arguments.remat and getattr(arguments, "compile", False):
        raise ValueError("--remat has no effect with --compile, whose compiler decides what it keeps: leave out one")
    if arguments.weights != "float32" and arguments.lora:
        raise ValueError(
            f"--weights {arguments.weights} is of all parameters that learn; a LoRA's are few and stay float32, and "
            "its base is computed in --dtype"
        )


def check_full(arguments: argparse.Namespace) -> None:
    """`check`, of the options of `train` alone too."""
    check(arguments)
    for option in ("base", "block_swap"):
        value, name = getattr(arguments, option), f"--{option.replace('_', '-')}"
        if value is not None and not arguments.lora:
            raise ValueError(f"{name} {value} is of the base of --lora RANK: parameters that learn are not stored so")
        if value is not None and arguments.compile:
            raise ValueError(
                f"{name} computes blocks again in the backward pass, which --compile does not: leave out one"
            )
    for name in ("control", "inversion"):
        if arguments.weights != "float32" and getattr(arguments, name) is not None:
            raise ValueError(f"--weights {arguments.weights}: what --{name} trains is small and stays float32")
    if not arguments.fused_update:
        return
    for name, is_given in (
        ("accumulate", arguments.accumulate > 1),
        ("compile", arguments.compile),
        ("optimizer muon", arguments.optimizer == "muon"),
        ("inversion, or --lora", arguments.inversion is not None and arguments.lora),
    ):
        if is_given:
            raise ValueError(
                "--fused-update updates each parameter once its gradient is there, of the whole batch and alone: "
                f"leave out --{name}"
            )


def update_rule(arguments: argparse.Namespace) -> "UpdateRule":
    """Update rule of the command line: optimiser, dtype of the weights, updates in the backward pass."""
    import torch

    from functional_sd3.training.update_rule import UpdateRule

    weights = getattr(torch, getattr(arguments, "weights", "float32"))
    return UpdateRule(arguments.optimizer, weights, getattr(arguments, "fused_update", False))


def with_computations(
    arguments: argparse.Namespace,
    model: "Model",
    trained: tuple[str, ...],
    mesh: "Mesh | None" = None,
    divided: tuple[str, ...] = (),
) -> "Model":
    """The model with the computations of its components' blocks in its config.

    trained: those that learn, or are frozen in the loss; divided: those of them that are divided over the mesh.
    """
    model = _with_memory(arguments, model, trained)
    if mesh is None or not divided:
        return model
    from functional_sd3.training import division

    return model._replace(config=division.with_parts(model.config, divided, mesh))


def _with_memory(arguments: argparse.Namespace, model: "Model", trained: tuple[str, ...]) -> "Model":
    from functional_sd3.core import transform
    from functional_sd3.core.computation import Computation
    from functional_sd3.parallel import offload

    swapped, base = getattr(arguments, "block_swap", None), getattr(arguments, "base", None)
    if not (arguments.remat or swapped or base):
        return model
    computations = {name: Computation(block_transform=transform.remat) for name in trained}
    if swapped:
        params = model.params["transformer"]
        some = params["patch"]["weight"]
        copied = offload.materialize(params["blocks"], some.device, dtype=some.dtype)
        computations["transformer"] = replace(computations["transformer"], materialize=copied)
    return model._replace(config=replace(model.config, computations={**model.config.computations, **computations}))
