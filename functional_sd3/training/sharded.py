"""Writing of a checkpoint by all processes of a mesh at once: a file each, and a manifest when all are on the disk.

Each process writes the pieces that it owns: of what several have the same, one does (`pieces.writers`). The folder
counts as a checkpoint once it has its manifest, which the first process puts there, by one renaming, after every file
is synced to the disk. A process that is killed at any moment leaves the checkpoints that were there, and a folder
without a manifest, which `checkpoint.sweep` removes.
"""

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Tree
from functional_sd3.formats import files
from functional_sd3.formats.errors import WeightsError
from functional_sd3.layouts import native
from functional_sd3.parallel import mesh as meshes
from functional_sd3.parallel import pieces
from functional_sd3.parallel.pieces import Piece
from functional_sd3.parallel.placement import Placement
from functional_sd3.parallel.processes import Processes
from functional_sd3.training import digests, manifest
from functional_sd3.training.stored import IDENTITY


def save(
    folder: Path, step: int, state: Tree, settings: dict[str, Any], placements: Tree | None, processes: Processes
) -> None:
    """Write the state of all processes to `folder`, in place of a checkpoint that is there; all of them call this.

    placements: of the leaves (`sharding.state_layout`), None where all are whole. Raises WeightsError, the same on all,
    when the system refuses one of them; nothing but what was there is left then.
    """
    flat = tree.flatten_paths(state)
    placed = placements_of(flat, placements)
    plan = pieces.writers(
        placed, {name: leaf.numel() * leaf.element_size() for name, leaf in flat.items()}, processes.mesh
    )
    own = {name: leaf for name, leaf in flat.items() if processes.mesh.rank in plan[name].values()}
    identity = processes.first(lambda: secrets.token_hex(8))
    names = [
        f"process-{rank:05d}-of-{processes.mesh.size():05d}-{identity}.safetensors"
        for rank in range(processes.mesh.size())
    ]
    path = folder / names[processes.mesh.rank]
    try:
        size, digest = agree(processes, lambda: _write(path, own, identity))
        written = [
            manifest.File(name, *entry) for name, entry in zip(names, processes.gather((size, digest)), strict=True)
        ]
        agree(processes, lambda: _publish(folder, step, settings, identity, written, flat, plan, processes))
    except BaseException:
        if not _is_published(folder, identity):
            with suppress(OSError):
                path.unlink(missing_ok=True)
                folder.rmdir()
        raise


def placements_of(flat: dict[str, Tensor], placements: Tree | None) -> dict[str, Placement]:
    """Path -> placement of every leaf, whole ones where none are given."""
    given = {} if placements is None else tree.flatten_paths(placements)
    return {name: given.get(name, Placement(tuple(leaf.shape))) for name, leaf in flat.items()}


def agree(processes: Processes, fn: Any) -> Any:
    """fn() of each process; where one raises a WeightsError, all raise that of the first that did, with its cause."""
    error: WeightsError | None = None
    value = None

    def run() -> None:
        nonlocal error, value
        try:
            value = fn()
        except WeightsError as raised:
            error = raised

    processes.together(run)
    if processes.is_alone:
        failures = [(error.problems, error.__cause__)] if error else []
    else:
        number = getattr(error and error.__cause__, "errno", None)
        gathered = processes.gather(None if error is None else (error.problems, number))
        failures = [(each[0], each[1] and OSError(each[1], os.strerror(each[1]))) for each in gathered if each]
    if failures:
        problems, cause = failures[0]
        raise WeightsError(problems) from cause
    return value


def remove(folder: Path) -> None:
    """Delete a checkpoint in several files: first the manifest, without which the rest is none."""
    (folder / manifest.NAME).unlink(missing_ok=True)
    for name in os.listdir(folder):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def _write(path: Path, own: dict[str, Tensor], identity: str) -> tuple[int, str]:
    """Size and digest of the file of this process."""
    files.write_atomic(path, own, metadata={IDENTITY: identity})
    return os.path.getsize(path), digests.file_digests([path])[0]


def _publish(
    folder: Path,
    step: int,
    settings: dict[str, Any],
    identity: str,
    written: list[manifest.File],
    flat: dict[str, Tensor],
    plan: dict[str, dict[Piece, int]],
    processes: Processes,
) -> None:
    """Write the manifest, in the first process, and remove the files of a checkpoint that it replaces."""
    if not processes.is_first:
        return
    for file in written:
        if not (folder / file.name).exists():
            raise WeightsError(
                f"{folder / file.name}: was written by another process, and the first one does not see it: --out must "
                "be on storage that all processes share"
            )
    leaves = {
        name: manifest.Leaf(
            leaf.dtype, next(iter(plan[name])).shape, tuple((rank, part) for part, rank in plan[name].items())
        )
        for name, leaf in flat.items()
    }
    mesh = meshes.describe(processes.mesh.sizes)
    described = manifest.Manifest(identity, step, native.VERSION, mesh, settings, tuple(written), leaves)
    files.write_atomic(folder / manifest.NAME, manifest.dump(described))
    with suppress(OSError):
        sweep(folder)


def _is_published(folder: Path, identity: str) -> bool:
    try:
        return manifest.read(folder).identity == identity
    except WeightsError:
        return False


def sweep(folder: Path) -> bool:
    """Remove the files of a folder that its manifest does not name, all with the folder where it has none; True if
    there were such."""
    try:
        named = {manifest.NAME, *(file.name for file in manifest.read(folder).files)}
    except WeightsError:
        if (folder / manifest.NAME).exists():
            # It is an unreadable checkpoint, which is set aside, not removed.
            return False
        named = set()
    others = [name for name in os.listdir(folder) if name not in named]
    for name in others:
        (folder / name).unlink(missing_ok=True)
    if not named:
        folder.rmdir()
    return bool(others) or not named
