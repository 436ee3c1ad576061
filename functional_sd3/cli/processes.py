"""Several processes of one command, as torchrun starts them: their mesh, and how all end when one is lost."""

import argparse
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from functional_sd3.cli import report

if TYPE_CHECKING:
    from functional_sd3.parallel.mesh import Mesh
    from functional_sd3.parallel.watch import Loss, Watch

MINUTES = 30.0
DRAWING = ("guidance", "sequence", "tensor")
"""Axes of the mesh of a command that draws."""


def add_mesh(parser: argparse.ArgumentParser | argparse._ArgumentGroup, help: str) -> None:  # noqa: A002
    """The options --mesh and --timeout."""
    parser.add_argument("--mesh", metavar="AXIS=N,...", help=help)
    waiting = (
        f"that processes wait for one another, as for the first to encode images, before they end (default {MINUTES:g})"
    )
    parser.add_argument("--timeout", type=float, metavar="MINUTES", default=MINUTES, help=waiting)


class Team(NamedTuple):
    """The mesh of the processes, and the watch over them."""

    mesh: "Mesh"
    watch: "Watch"


def count() -> int:
    """Number of processes that torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if report.has_launcher() else 1


def check_command(arguments: argparse.Namespace) -> None:
    """Raises ValueError where torchrun has started several processes of a command that has no --mesh."""
    if count() > 1 and not hasattr(arguments, "mesh"):
        raise ValueError(
            f"this command runs in one process, and torchrun has started {count()}, which would all do the same: start "
            "it without torchrun; train, distill, reward and generate divide their work by --mesh"
        )


@contextmanager
def team(
    arguments: argparse.Namespace, axes: Sequence[str], command: str, advice: Callable[[], str] | None = None
) -> "Iterator[Team | None]":
    """The processes of --mesh, of some axes; None without it, and with one process.

    When one of them is lost the others say so, with `advice()`, and end with status 1. command: such as "generate", for
    messages. Raises ValueError, in every process, for a mesh that is none or is for another number of processes, for
    several processes without one, and for a --timeout that is none.
    """
    text, processes = arguments.mesh, count()
    if not 0 < arguments.timeout <= 1e5:
        raise ValueError(f"--timeout {arguments.timeout} must be a positive number of minutes, such as {MINUTES:g}")
    if text is None and processes == 1:
        yield None
        return
    import torch
    import torch.distributed as dist

    from functional_sd3.parallel import mesh as meshes
    from functional_sd3.parallel.processes import is_on_all
    from functional_sd3.parallel.watch import Watch

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
    has_cuda, timeout = torch.cuda.is_available(), timedelta(minutes=arguments.timeout)
    if has_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    is_ours = not dist.is_initialized()
    if is_ours:
        _check_port()
        _init_process_group("nccl" if has_cuda else "gloo", timeout)
    watch = Watch(lambda loss: _end(loss, command, advice))
    try:
        yield Team(meshes.init(sizes), watch)
    except BaseException as error:
        # Not the group: the others may wait in a collective.
        if is_on_all(error):
            watch.close()
            raise
        watch.failed(error)
        if isinstance(error, RuntimeError) and re.search("timed? ?out", str(error), re.IGNORECASE):
            hung = f"another process gave no answer within {arguments.timeout:g} minutes (--timeout): it hangs"
            raise TimeoutError(f"{hung}{'' if advice is None else '; ' + advice()}") from error
        raise
    watch.close()
    if is_ours:
        dist.destroy_process_group()


def _init_process_group(backend: str, timeout: timedelta) -> None:
    """The process group of all, by addresses of this start: torchrun (2.13) keeps one store for all of its restarts, in
    which those of the processes before would be found."""
    import torch.distributed as dist

    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    # On several machines the counts of restarts differ (docs/guides/scale.md).
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _check_port() -> None:
    """Raises ValueError for a port at which the processes would wait for one another for ever."""
    port = os.environ.get("MASTER_PORT", "")
    if not (port.isascii() and port.isdigit() and 1 <= int(port) < 2**16):
        raise ValueError(
            f"MASTER_PORT is {port!r}, where the processes meet, and must be a free port from 1 to 65535: torchrun "
            "--master-port 29500; without --master-port, or with --standalone, torchrun chooses one"
        )


def _end(loss: "Loss", command: str, advice: Callable[[], str] | None) -> None:
    """Say which process was lost, and end this one: no error can reach code that waits in a collective."""
    if report.is_first_process() or loss.rank == 0:
        at = "before the first step" if loss.step is None else f"at step {loss.step}"
        how = "was lost (killed, or its machine is gone)" if loss.reason is None else f"failed: {loss.reason}"
        report.error(
            f"functional-sd3 {command}: process {loss.rank} {how}; the others end {at}"
            + (f"; {advice()}" if advice is not None else "")
        )
    os._exit(1)
