"""Several processes of one command, as torchrun starts them: their mesh, and that the first alone prints and writes."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from functional_sd3.cli import report

if TYPE_CHECKING:
    from functional_sd3.parallel.mesh import Mesh

DRAWING = ("guidance", "sequence", "tensor")
"""Axes of the mesh of a command that draws."""


def add_mesh(parser: argparse.ArgumentParser | argparse._ArgumentGroup, help: str) -> None:  # noqa: A002
    """The option --mesh."""
    parser.add_argument("--mesh", metavar="AXIS=N,...", help=help)


def count() -> int:
    """Number of processes that torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if report.has_launcher() else 1


@contextmanager
def mesh(text: str | None, axes: Sequence[str], command: str) -> "Iterator[Mesh | None]":
    """The mesh of --mesh, of some axes; None without it, and with one process.

    command: such as "generate", for messages. Raises ValueError, in every process, for a mesh that is none or is for
    another number of processes, and for several processes without one.
    """
    processes = count()
    if text is None and processes == 1:
        yield None
        return
    import torch
    import torch.distributed as dist

    from functional_sd3.parallel import mesh as meshes

    if text is None:
        raise ValueError(
            f"torchrun has started {processes} processes, which would all do the same: --mesh says what they divide, "
            f"such as --mesh {axes[0]}={processes} ({', '.join(axes)})"
        )
    try:
        sizes = meshes.parse(text, axes)
    except ValueError as error:
        raise ValueError(f"--mesh: {error}") from None
    wanted = 1
    for size in sizes.values():
        wanted *= size
    if wanted != processes:
        raise ValueError(
            f"--mesh {text} is for {wanted} process{'es' * (wanted > 1)}, but there "
            f"{'is' if processes == 1 else 'are'} {processes}: "
            f"torchrun --nproc-per-node {wanted} -m functional_sd3 {command} ... starts {wanted}"
        )
    if processes == 1:
        yield None
        return
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    is_ours = not dist.is_initialized()
    if is_ours:
        _check_port()
        dist.init_process_group("nccl" if has_cuda else "gloo")
    yield meshes.init(sizes)
    # Not after an error: the others may wait in a collective, and torchrun ends them.
    if is_ours:
        dist.destroy_process_group()


def _check_port() -> None:
    """Raises ValueError for a port at which the processes would wait for one another for ever."""
    port = os.environ.get("MASTER_PORT", "")
    if not (port.isascii() and port.isdigit() and 1 <= int(port) < 2**16):
        raise ValueError(
            f"MASTER_PORT is {port!r}, where the processes meet, and must be a free port from 1 to 65535: torchrun "
            "--master-port 29500; without --master-port, or with --standalone, torchrun chooses one"
        )
