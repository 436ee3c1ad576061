"""Fields of the page and parameters of its API: each is a field of the `Request`, read as an option of `generate`."""

import argparse
import re
from typing import Any, NamedTuple

from functional_sd3.cli import parser
from functional_sd3.formats.printable import shorten


class Field(NamedTuple):
    """A field of `pipeline.Request` or of one of its parts, and the option of `generate` that takes its value."""

    option: str
    """The option's name; that of the prompts is a word without hyphens."""
    kind: type
    """str, int, float, bool, or list (of texts)."""


FIELDS = {
    "prompts": Field("prompt", str),
    "negative": Field("--negative", str),
    "key": Field("--seed", int),
    "width": Field("--size", int),
    "height": Field("--size", int),
    "steps": Field("--steps", int),
    "cfg": Field("--cfg", float),
    "method": Field("--method", str),
    "guidance": Field("--guidance", list),
    "cache": Field("--cache", str),
    "loras": Field("--lora", list),
    "strength": Field("--strength", float),
    "soften": Field("--soften", float),
    "restore": Field("--restore", bool),
    "weighted": Field("--weighted", bool),
    "long_prompts": Field("--long", bool),
}
"""Fields by their name in the `Request`. `start`, the image and its mask, is a file and not one of these."""

COUNT = "count"
"""Images of each prompt: the one parameter that is no field of the `Request`, whose prompts and keys are repeated."""
EXTRA = {COUNT: Field("--count", int)}
EVERY = {**FIELDS, **EXTRA}

BY_DEFAULT = ("width", "height", "strength", "soften")
"""Numbers that 0 leaves to their default, as an empty box does: one of numbers alone shows it as 0."""
_LONG = 90
"""Characters of a description that is given whole."""

Values = dict[str, Any]
"""Values by the name of their field; None, "" and [] leave a field to its default."""


def generate_parser() -> argparse.ArgumentParser:
    """The parser of `generate`, which raises ValueError where the command line would end."""
    made = parser.subparser("generate")

    def refuse(message: str) -> None:
        raise ValueError(message)

    # argparse writes to standard error and exits.
    made.error = refuse  # type: ignore[method-assign,assignment]
    return made


def action_of(generate: argparse.ArgumentParser, field: Field) -> argparse.Action:
    """The action of a field's option."""
    return next(
        action for action in generate._actions if field.option in action.option_strings or field.option == action.dest
    )


def label(name: str) -> str:
    """The label of a field: its option in words."""
    return {"--size": name}.get(EVERY[name].option, EVERY[name].option.removeprefix("--").replace("-", " "))


def description(generate: argparse.ArgumentParser, name: str) -> str:
    """The description of a field: the help of its option without the default, which the page shows; of a long one the
    beginning, and of one that takes words of several parts how they are written."""
    action = action_of(generate, EVERY[name])
    text = re.sub(r" \(default[^()]*(\([^()]*\)[^()]*)*\)", "", str(action.help))
    if len(text) > _LONG:
        text = re.split(r"[;:]|\. ", text)[0]
    return f"{text}; {action.metavar}" if EVERY[name].kind is list or name == "cache" else text


def typed(values: Values) -> Values:
    """The values that are given, each of the kind of its field. Raises ValueError, with the name, for other kinds."""
    given = {}
    for name, value in values.items():
        if value is None or value is False or value in ("", []) or (name in BY_DEFAULT and value == 0):
            continue
        kind = EVERY[name].kind
        # Numbers of a page are floats.
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        fits = isinstance(value, int | float if kind is float else kind) and (kind is bool or value is not True)
        if not fits or (kind is list and not all(isinstance(each, str) for each in value)):
            words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "texts"}
            raise ValueError(f"{name} {shorten(repr(value))} must be {words[kind]}")
        given[name] = value
    return given
