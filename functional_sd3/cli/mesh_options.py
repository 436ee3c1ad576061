"""--mesh: a run on the processes that torchrun started."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_sd3.cli import processes, train_checks

if TYPE_CHECKING:
    from functional_sd3.cli.training_run import Setup
    from functional_sd3.parallel.processes import Processes

AXES = ("data", "fsdp")
"""The axes that a batch is divided along."""
WITHIN = ("sequence", "tensor")
"""Mesh axes along which the work of one image is divided."""


def add_arguments(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Option of the commands that train."""
    processes.add_mesh(
        group,
        "the processes of torchrun: data=N divides the rows of a batch, fsdp=N the parameters too, sequence=N the "
        "tokens of each image, tensor=N the transformer's heads; or several, as data=2,fsdp=4; "
        "torchrun --nproc-per-node 8 -m functional_sd3 train --mesh fsdp=8 ...",
    )


@contextlib.contextmanager
def started(arguments: argparse.Namespace) -> "Iterator[Processes]":
    """Context with the processes of the run.

    Raises ValueError, in every process, for words that are no mesh and for one that does not fit the processes.
    """
    command = getattr(arguments, "subcommand", "train")
    with processes.team(
        arguments, (*AXES, *WITHIN), command, lambda: train_checks.newest_checkpoint(arguments.out)
    ) as team:
        import torch

        from functional_sd3.parallel.processes import ALONE, Processes

        if team is None:
            yield ALONE
        else:
            device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
            yield Processes(team.mesh, device, team.watch)


def check_batch(arguments: argparse.Namespace, team: "Processes") -> None:
    """Raises ValueError where the batch, or its accumulated parts, do not divide over the processes, or where an option
    works on one process alone."""
    if team.is_alone:
        return
    for axis in (*AXES, *WITHIN):
        if team.mesh.size(axis) > 1 and (reason := refusal(arguments, axis)):
            raise ValueError(reason)
    count, size = team.mesh.size(*AXES), arguments.batch_size
    # An update by rewards is divided by prompts, each with its group of images.
    parts, option = (
        (arguments.group, "--group") if hasattr(arguments, "group") else (arguments.accumulate, "--accumulate")
    )
    if size % (count * parts):
        raise ValueError(
            f"--batch-size {size} cannot be divided over {count} processes ({option} {parts}): give a multiple of "
            f"{count * parts}"
        )


def refusal(arguments: argparse.Namespace, axis: str) -> str | None:
    """Reason why options of a command do not go with an axis of the mesh, None where they do: docs/guides/scale.md."""
    if axis in WITHIN and getattr(arguments, "part", None) == "vae":
        what = {"sequence": "tokens", "tensor": "heads"}[axis]
        return f"--mesh {axis} divides the {what} of the transformer, and --part vae has none: use data or fsdp"
    if axis == "sequence" and getattr(arguments, "compile", False):
        return (
            "--compile makes one graph of a step, in which parts of different lengths are not exchanged, as those of "
            "--mesh sequence are: use data, fsdp or tensor, or leave out --compile"
        )
    if axis == "tensor" and getattr(arguments, "control", None):
        return (
            "--mesh tensor divides the heads of the transformer, and --control copies whole blocks of it: use data, "
            "fsdp or sequence"
        )
    if axis == "tensor" and arguments.optimizer == "muon":
        return (
            "--optimizer muon turns whole matrices, of which --mesh tensor leaves each process a part: use fsdp, or "
            "--optimizer adamw"
        )
    return None


def prepared(team: "Processes", prepare: "Callable[[bool], Setup]") -> "Setup":
    """The run as `prepare(is_first)` puts it together: in the first process, then in the others, which read what that
    one encoded.

    Raises ValueError where a process has another program, other options, weights or images than the first.
    """
    setup = team.in_turn(prepare)
    if not team.is_alone:
        settings = {"the program": _program_digest(), **setup.settings}
        theirs = team.gather(settings)
        team.together(lambda: _check_same(theirs))
    return setup


def _check_same(settings: list[dict[str, Any]]) -> None:
    for rank, other in enumerate(settings):
        names = [name for name in {**settings[0], **other} if settings[0].get(name) != other.get(name)]
        if names:
            raise ValueError(
                f"process {rank} has another value than process 0 of: {', '.join(map(str, names))}. All processes of a "
                "run need the same program, options, weights and images"
            )


def _program_digest() -> str:
    """Digest of the sources of this package."""
    from functional_sd3.training import digests

    package = Path(__file__).resolve().parents[1]
    files = sorted(package.rglob("*.py"))
    return digests.combined([*(os.fspath(file.relative_to(package)) for file in files), *digests.file_digests(files)])
