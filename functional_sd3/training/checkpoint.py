"""Training states on disk: one safetensors file a checkpoint, written whole or not at all.

`step-00001200.safetensors` holds every leaf under its path ("params.transformer.blocks.0...", "optimizer.1.0.mean...")
and, in its metadata, the settings of the run as JSON.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Tree
from functional_sd3.weights import files

_NAME = re.compile(r"step-(\d+)\.safetensors")


def save(folder: str | os.PathLike, step: int, state: Tree, settings: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step`. Raises WeightsError when the system refuses; nothing is left then."""
    path = Path(folder) / f"step-{step:08d}.safetensors"
    files.write_atomic(path, tree.flatten_paths(state), metadata={"settings": json.dumps(settings, sort_keys=True)})
    return path


def found(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints of a folder, oldest first; empty when the folder does not exist."""
    folder = Path(folder)
    names = os.listdir(folder) if folder.is_dir() else []
    steps = {int(match[1]): folder / name for name in names if (match := _NAME.fullmatch(name))}
    return [steps[step] for step in sorted(steps)]


def settings(path: str | os.PathLike) -> dict[str, Any]:
    """The settings a checkpoint was saved with. Raises WeightsError when it cannot be read."""
    return json.loads(files.read_header(path).metadata.get("settings", "{}"))


def load(path: str | os.PathLike, like: Tree) -> Tree:
    """The state in a checkpoint, in the structure and on the device of `like`.

    Raises WeightsError when the file cannot be read, naming each path that is missing, unexpected, or of another shape
    or dtype than in `like`.
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
        raise files.WeightsError(sorted(problems))

    def read(name: str, leaf: Tensor) -> Tensor:
        # A copy of its own: a donated step may write into it, and the file may be pruned.
        return files.tensor(mapped, name).to(leaf.device, copy=True)

    with torch.no_grad():
        return tree.map_with_path(read, like)


def prune(folder: str | os.PathLike, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints."""
    for path in found(folder)[: -max(keep, 1)]:
        path.unlink(missing_ok=True)
