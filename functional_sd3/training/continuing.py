"""Differences between the settings of a resumed run and those of its checkpoint, and which are allowed."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from functional_sd3.formats.printable import shorten
from functional_sd3.parallel import mesh

FIXED = (
    "part", "lora", "scratch", "text-encoders", "decoder-only", "control", "control-depth", "inversion", "vectors",
    "inversion-t5", "optimizer", "weights", "log-variance",
)  # fmt: skip
"""Options that decide which numbers a checkpoint holds."""
CONTENTS = "contents of "
"""Prefix of the names of digests, which are compared where the checkpoint has them."""
_FREE = ("steps", "params", "data", "template", "mesh")
_ONE_PROCESS = mesh.describe({})


class Difference(NamedTuple):
    """A setting, its value in the checkpoint and its value on the command line; is_fixed: the two decide which numbers
    a checkpoint holds, as all values of those in `FIXED` do."""

    name: str
    before: Any
    now: Any
    is_fixed: bool = False

    def __str__(self) -> str:
        if self.name.startswith(CONTENTS):
            return f"the {self.name} changed (digest {shorten(self.before, 12)} -> {shorten(self.now, 12)})"
        return f"{self.name} {_short(self.before)} -> {_short(self.now)}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Difference]:
    """The settings that differ. One that the checkpoint lacks, as it is older than the option, had its default.

    The paths "params" and "data" are not compared where the checkpoint has digests of their contents; captions are
    compared, not the template that some were made by; and of "mesh" and "accumulate" the number of parts that a batch
    is added up from, which is the same on 4 processes and in 4 accumulated parts.
    """
    old = {**defaults, **before}
    free = {*_FREE, "accumulate"} if _parts(old) == _parts(now) else _FREE
    changes = [
        Difference(name, old[name], value)
        for name, value in now.items()
        if name not in free and name in old and old[name] != value
    ]
    if any(each.name == CONTENTS + "the data" for each in changes):
        implied = ("fingerprint of the data", CONTENTS + "the tokens")
        changes = [each for each in changes if each.name not in implied]
    # The path alone is no difference, but where the contents differ it shows the path to pass.
    is_model = any(each.name.startswith(CONTENTS) and each.name.endswith(" of the model") for each in changes)
    if is_model or not any(name.startswith(CONTENTS) for name in before):
        if before.get("params", now["params"]) != now["params"]:
            changes.append(Difference("params", before["params"], now["params"]))
    return changes


def check(changes: list[Difference], out: object, *, force: bool) -> None:
    """Raises ValueError where a difference is not allowed, naming each and what would be right."""
    fixed = [each for each in changes if each.is_fixed or each.name in FIXED]
    if fixed:
        raise ValueError(
            f"the run in {out} was started with other settings: {_listed(fixed)}. "
            "Even with --force that takes another folder"
        )
    if changes and not force:
        raise ValueError(
            f"the run in {out} was started with other settings: {_listed(changes)}. Resume with the same, "
            "pass --force to go on with the new ones, or start in another folder"
        )


def notes(changes: list[Difference], before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Sentences on the settings that change and on those that cannot be compared."""
    sentences = [f"changed by --force: {_listed(changes)}"] if changes else []
    if "mesh" in before and (meshes := [_mesh(settings) for settings in (before, now)])[0] != meshes[1]:
        old, new = _parts(before), _parts(now)
        parts = (
            f"{old} parts as before" if old == new else f"{new} parts and not from {old}: sums are rounded otherwise"
        )
        sentences.append(f"mesh {meshes[0]} -> {meshes[1]}; a batch is added up from {parts}")
    unknown = [name for name in before if name not in now and name not in _FREE]
    if unknown:
        sentences.append(
            f"settings of the checkpoint that this version does not know are ignored: {_shortened(unknown)}"
        )
    if not any(name.startswith(CONTENTS) for name in before):
        sentences.append(
            "the checkpoint has no digests of the weights and images it began with, so they are not compared"
        )
    return sentences


def _parts(settings: Mapping[str, Any]) -> int:
    """Number of parts that the gradient of a batch is the sum of."""
    sizes, accumulate = mesh.parse(_mesh(settings)), settings.get("accumulate", 1)
    return math.prod(sizes.get(axis, 1) for axis in mesh.BATCH_AXES) * (
        accumulate if isinstance(accumulate, int) else 1
    )


def _mesh(settings: Mapping[str, Any]) -> str:
    """The mesh of a run; that of one process where its checkpoint, which may be older, names none."""
    text = settings.get("mesh")
    try:
        return mesh.describe(mesh.parse(text)) if isinstance(text, str) else _ONE_PROCESS
    except ValueError:
        return _ONE_PROCESS


def _listed(changes: list[Difference]) -> str:
    return "; ".join(map(str, changes))


def _shortened(names: list[str]) -> str:
    return shorten(", ".join(names), 200)


def _short(value: Any) -> str:
    return shorten(value, 60)
