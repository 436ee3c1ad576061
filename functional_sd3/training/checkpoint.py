"""Checkpoints: one safetensors file for each training state, or one a process of a mesh; complete or absent as a whole.

`step-00001200.safetensors` holds every leaf under its path ("params.transformer.blocks.0...", "optimizer.1.0.mean...")
and, in its metadata, the settings of the run as JSON. Several processes write a folder `step-00001200` (`sharded`), of
which each writes a file and the first a manifest last. Either is read by any number of processes, of which each reads
what it needs.
"""

import functools
import itertools
import json
import math
import mmap
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Tree
from functional_sd3.formats import files, finite
from functional_sd3.formats.errors import WeightsError, reason
from functional_sd3.layouts import native
from functional_sd3.parallel import pieces
from functional_sd3.parallel.mesh import ONE_PROCESS, Mesh
from functional_sd3.parallel.processes import ALONE, Processes
from functional_sd3.training import manifest, sharded, stored
from functional_sd3.weights import metadata

MIN_KEPT = 2
"""Least number of checkpoints to keep: the newest may be unreadable."""
_NAME = re.compile(r"step-([0-9]{1,18})(\.safetensors)?")


def save(
    folder: str | os.PathLike,
    step: int,
    state: Tree,
    settings: dict[str, Any],
    *,
    placements: Tree | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Write `state` as the checkpoint of `step`. Raises WeightsError when the system refuses; nothing is left then.

    processes: that call this together, each with its part of the state. placements: of its leaves
    (`sharding.state_layout`), None where each process has all of them.
    """
    folder = Path(folder)
    if not processes.is_alone:
        path = folder / f"step-{step:08d}"
        sharded.save(path, step, state, settings, placements, processes)
        return path
    path = folder / f"step-{step:08d}.safetensors"
    notes = {"settings": json.dumps(settings, sort_keys=True), metadata.VERSION_KEY: str(native.VERSION)}
    files.write_atomic(path, tree.flatten_paths(state), metadata=notes)
    return path


def paths(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints of a folder, oldest first; empty when the folder does not exist."""
    folder = Path(folder)
    names = os.listdir(folder) if folder.is_dir() else []
    steps = [
        (int(match[1]), name) for name in names if (match := _NAME.fullmatch(name)) and _is_complete(folder, match)
    ]
    return [folder / name for _, name in sorted(steps)]


def settings(path: str | os.PathLike) -> dict[str, Any]:
    """The settings a checkpoint was saved with, {} where it has none. Raises WeightsError when they cannot be read."""
    return stored.settings(Path(path))


def load(path: str | os.PathLike, like: Tree, *, placements: Tree | None = None, mesh: Mesh = ONE_PROCESS) -> Tree:
    """The state in a checkpoint, in the structure and on the device of `like`; of an older version too.

    placements: of the leaves of `like` on this process of the mesh, which reads these pieces alone; None where it has
    all. Of several files it compares its share of the digests. Raises WeightsError when a file cannot be read, naming
    each path that is missing, unexpected, of another shape or dtype than in `like`, or that holds NaN or an infinity.
    """
    opened = stored.open_stored(Path(path))
    present, wanted = opened.leaves, tree.flatten_paths(like)
    parts = {name: pieces.piece(each, mesh) for name, each in sharded.placements_of(wanted, placements).items()}
    problems = [f"{path}: {name} is missing" for name in wanted if name not in present]
    problems += [f"{path}: {name} is unexpected" for name in present if name not in wanted]
    for name in wanted.keys() & present.keys():
        ours, theirs = (parts[name].shape, wanted[name].dtype), (present[name].shape, present[name].dtype)
        if ours != theirs:
            problems.append(f"{path}: {name} is {theirs[1]} {list(theirs[0])}, the run has {ours[1]} {list(ours[0])}")
    if problems:
        raise WeightsError(sorted(problems))
    stored.check_digests(opened, mesh.rank, mesh.size())

    def read(name: str, leaf: Tensor) -> Tensor:
        # Copied: a donated step may write into it, and the file may be pruned.
        return stored.read(opened, name, parts[name]).to(leaf.device)

    with torch.no_grad():
        state = tree.map_with_path(read, like)
    if problem := not_finite(state):
        raise WeightsError(f"{path}: {problem}")
    return state


class Resumed(NamedTuple):
    """A state, the checkpoint it was read from and its settings; `passed_over`: newer, unreadable ones with their
    errors."""

    state: Tree
    path: Path
    settings: dict[str, Any]
    passed_over: tuple[tuple[Path, WeightsError], ...]


def load_newest(
    folder: str | os.PathLike,
    like: Tree,
    check: Callable[[dict[str, Any]], None],
    *,
    placements: Tree | None = None,
    processes: Processes = ALONE,
) -> Resumed:
    """The newest checkpoint of a folder that can be read, by all processes.

    `check` is called with the settings of each before its state is read, and what it raises is raised. Raises
    WeightsError, naming each file, when there is none that can be read. placements: as in `load`.
    """
    passed_over: list[tuple[Path, WeightsError]] = []

    def load_one(path: Path) -> Tree:
        state = load(path, like, placements=placements, mesh=processes.mesh)
        if int(state.step) != step_of(path):
            raise WeightsError(f"{path}: holds the state of step {int(state.step)}")
        return state

    for path in processes.first(lambda: paths(folder)[::-1]):
        try:
            saved = sharded.agree(processes, functools.partial(settings, path))
        except WeightsError as error:
            passed_over.append((path, error))
            continue
        processes.together(functools.partial(check, saved))
        try:
            state = sharded.agree(processes, functools.partial(load_one, path))
        except WeightsError as error:
            passed_over.append((path, error))
            continue
        return Resumed(state, path, saved, tuple(passed_over))
    problems = [problem for _, error in passed_over for problem in error.problems]
    processes.fail(WeightsError(problems or f"{folder}: there is no checkpoint"))


def whole(path: Path, under: str, like: Tree, cast: Callable[[str, Tensor], Tensor] = lambda name, leaf: leaf) -> Tree:
    """The tree of a checkpoint below a path, such as "ema", in the structure of `like`, each leaf whole.

    One leaf at a time is put together from its pieces and passed through `cast` (path below `under`, leaf); then it is
    mapped from a nameless file beside the checkpoint, so that not all of them need fit into memory. Raises WeightsError
    where the files cannot be read or the disk has no room.
    """
    opened = stored.open_stored(path)

    def put_together(name: str, leaf: Tensor) -> Tensor:
        return _on_disk(path.parent, cast(name, stored.read(opened, f"{under}.{name}")))

    with torch.no_grad():
        return tree.map_with_path(put_together, like)


def _on_disk(folder: Path, value: Tensor) -> Tensor:
    """The tensor, mapped from a nameless file of a folder."""
    size = max(value.numel(), 1) * value.dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # A sparse file on a full disk would end the process when it is written to.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            buffer = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise WeightsError(f"{folder}: a whole leaf cannot be put together here: {reason(error)}") from error
    return torch.frombuffer(buffer, dtype=value.dtype)[: value.numel()].view(value.shape).copy_(value)


def set_aside(path: Path) -> Path:
    """Rename an unreadable checkpoint so that it no longer counts as one; returns its new path."""
    target = path.with_name(path.name + ".unreadable")
    for number in itertools.count(2):
        if not target.is_dir():
            break
        target = path.with_name(f"{path.name}.unreadable-{number}")
    os.replace(path, target)
    return target


def not_finite(state: Tree) -> str | None:
    """The first leaf of a state that holds NaN or an infinity, as a sentence; None when there is none."""
    for name, leaf in tree.flatten_paths(state).items():
        if leaf.is_floating_point() and (kind := finite.nonfinite_kind(leaf)):
            return f"{name} holds {kind}"
    return None


def prune(folder: str | os.PathLike, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints, at least one."""
    for path in paths(folder)[: -max(keep, 1)]:
        if path.is_dir():
            sharded.remove(path)
        else:
            path.unlink(missing_ok=True)


def sweep(folder: str | os.PathLike) -> list[int]:
    """Remove what writes of checkpoints left that were broken off; returns their steps. For the one run of a folder."""
    folder = Path(folder)
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    written = [(match, folder / name) for name in names if (match := _NAME.fullmatch(name)) and not match[2]]
    return [int(match[1]) for match, path in written if path.is_dir() and sharded.sweep(path)]


def nbytes(state: Tree, placements: Tree | None, mesh: Mesh) -> int:
    """Bytes of the whole state of which a process has its part."""
    flat = tree.flatten_paths(state)
    placed = sharded.placements_of(flat, placements)
    return sum(math.prod(pieces.piece(placed[name], mesh).shape) * leaf.element_size() for name, leaf in flat.items())


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(path.stem.rpartition("-")[2])


def _is_complete(folder: Path, name: re.Match[str]) -> bool:
    return bool(name[2]) or (folder / name[0] / manifest.NAME).exists()
