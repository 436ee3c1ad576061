"""Differences between the settings of a resumed run and those of its checkpoint, and which are allowed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from functional_sd3.formats.printable import shorten

FIXED = ("part", "lora", "scratch", "text-encoders", "decoder-only")
"""Options that decide which numbers a checkpoint holds."""
CONTENTS = "contents of "
"""How the names of digests start: they are compared where the checkpoint has them."""
_FREE = ("steps", "params", "data", "template")


class Difference(NamedTuple):
    """A setting, what the checkpoint has and what the command line says."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        if self.name.startswith(CONTENTS):
            return f"the {self.name} changed (digest {shorten(self.before, 12)} -> {shorten(self.now, 12)})"
        return f"{self.name} {_short(self.before)} -> {_short(self.now)}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Difference]:
    """The settings that differ. One that the checkpoint lacks, as it is older than the option, had its default.

    Where files lie ("params", "data") is no difference of its own where the checkpoint has digests of what is in them;
    captions are compared, not the template that some were made by.
    """
    old = {**defaults, **before}
    found = [
        Difference(name, old[name], value)
        for name, value in now.items()
        if name not in _FREE and name in old and old[name] != value
    ]
    if any(each.name == CONTENTS + "the data" for each in found):
        implied = ("fingerprint of the data", CONTENTS + "the tokens")
        found = [each for each in found if each.name not in implied]
    # Where the files lie is no difference of its own, but where their contents differ it says what to give.
    is_model = any(each.name.startswith(CONTENTS) and each.name.endswith(" of the model") for each in found)
    if is_model or not any(name.startswith(CONTENTS) for name in before):
        if before.get("params", now["params"]) != now["params"]:
            found.append(Difference("params", before["params"], now["params"]))
    return found


def check(found: list[Difference], out: object, *, force: bool) -> None:
    """Raises ValueError where a difference is not allowed, naming each and what would be right."""
    fixed = [each for each in found if each.name in FIXED]
    if fixed:
        raise ValueError(
            f"the run in {out} was begun otherwise: {_listed(fixed)}. Even with --force that takes another folder"
        )
    if found and not force:
        raise ValueError(
            f"the run in {out} was begun otherwise: {_listed(found)}. Resume with the same, pass --force to go on with "
            "what is given now, or begin in another folder"
        )


def notes(found: list[Difference], before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Sentences on what changes, and on what cannot be compared."""
    said = [f"changed by --force: {_listed(found)}"] if found else []
    unknown = [name for name in before if name not in now and name not in _FREE]
    if unknown:
        said.append(f"settings of the checkpoint that this version does not know are ignored: {_shortened(unknown)}")
    if not any(name.startswith(CONTENTS) for name in before):
        said.append("the checkpoint has no digests of the weights and images it began with, so they are not compared")
    return said


def _listed(found: list[Difference]) -> str:
    return "; ".join(map(str, found))


def _shortened(names: list[str]) -> str:
    return shorten(", ".join(names), 200)


def _short(value: Any) -> str:
    return shorten(value, 60)
