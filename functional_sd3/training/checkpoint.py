"""Checkpoints: one safetensors file for each training state, written atomically.

`step-00001200.safetensors` holds every leaf under its path ("params.transformer.blocks.0...", "optimizer.1.0.mean...")
and, in its metadata, the settings of the run as JSON.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Tree
from functional_sd3.formats import files, finite, json_fields
from functional_sd3.formats.errors import WeightsError
from functional_sd3.layouts import native
from functional_sd3.layouts.rules import swap_halves
from functional_sd3.weights import metadata

MIN_KEPT = 2
"""Least number of checkpoints to keep: the newest may be unreadable."""
_NAME = re.compile(r"step-([0-9]{1,18})\.safetensors")


def save(folder: str | os.PathLike, step: int, state: Tree, settings: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step`. Raises WeightsError when the system refuses; nothing is left then."""
    path = Path(folder) / f"step-{step:08d}.safetensors"
    notes = {"settings": json.dumps(settings, sort_keys=True), metadata.VERSION_KEY: str(native.VERSION)}
    files.write_atomic(path, tree.flatten_paths(state), metadata=notes)
    return path


def paths(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints of a folder, oldest first; empty when the folder does not exist."""
    folder = Path(folder)
    names = os.listdir(folder) if folder.is_dir() else []
    steps = {int(match[1]): folder / name for name in names if (match := _NAME.fullmatch(name))}
    return [steps[step] for step in sorted(steps)]


def settings(path: str | os.PathLike) -> dict[str, Any]:
    """The settings a checkpoint was saved with, {} where it has none. Raises WeightsError when they cannot be read."""
    text = files.read_header(path).metadata.get("settings", "{}")
    return dict(json_fields.parse_object(text, f"{path}: its settings").values)


def load(path: str | os.PathLike, like: Tree) -> Tree:
    """The state in a checkpoint, in the structure and on the device of `like`; of an older version too.

    Raises WeightsError when the file cannot be read, naming each path that is missing, unexpected, of another shape or
    dtype than in `like`, or that holds NaN or an infinity.
    """
    mapped = files.open_mapped(path)
    entries, wanted = mapped.header.tensors, tree.flatten_paths(like)
    problems = [f"{path}: {name} is missing" for name in wanted if name not in entries]
    problems += [f"{path}: {name} is unexpected" for name in entries if name not in wanted]
    for name in wanted.keys() & entries.keys():
        ours, theirs = (tuple(wanted[name].shape), wanted[name].dtype), (entries[name].shape, entries[name].dtype)
        if ours != theirs:
            problems.append(f"{path}: {name} is {theirs[1]} {list(theirs[0])}, the run has {ours[1]} {list(ours[0])}")
    if problems:
        raise WeightsError(sorted(problems))

    version = metadata.version(mapped.header.metadata, str(path))
    swapped = native.swapped_in_version_1(wanted) if version == 1 else ()

    def read(name: str, leaf: Tensor) -> Tensor:
        value = files.tensor(mapped, name)
        # Copied: a donated step may write into it, and the file may be pruned.
        return (swap_halves(value) if name in swapped else value).to(leaf.device, copy=True)

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


def load_newest(folder: str | os.PathLike, like: Tree, check: Callable[[dict[str, Any]], None]) -> Resumed:
    """The newest checkpoint of a folder that can be read.

    `check` is called with the settings of each before its state is read, and what it raises is raised. Raises
    WeightsError, naming each file, when there is none that can be read.
    """
    passed_over: list[tuple[Path, WeightsError]] = []
    for path in reversed(paths(folder)):
        try:
            saved = settings(path)
        except WeightsError as error:
            passed_over.append((path, error))
            continue
        check(saved)
        try:
            state = load(path, like)
            if int(state.step) != step_of(path):
                raise WeightsError(f"{path}: holds the state of step {int(state.step)}")
        except WeightsError as error:
            passed_over.append((path, error))
            continue
        return Resumed(state, path, saved, tuple(passed_over))
    if not passed_over:
        raise WeightsError(f"{folder}: there is no checkpoint")
    raise WeightsError([problem for _, error in passed_over for problem in error.problems])


def set_aside(path: Path) -> Path:
    """Rename an unreadable checkpoint so that it no longer counts as one; returns its new path."""
    target = path.with_name(path.name + ".unreadable")
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
        path.unlink(missing_ok=True)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(path.stem.rpartition("-")[2])
