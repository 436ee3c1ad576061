"""`--settings IMAGE`: the settings that an image was drawn with, as the defaults of a command line."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from functional_sd3.cli import image_settings, options, parser
from functional_sd3.cli.parser import CommandLine

_DRAWN_BY = "generate"


def parse(words: Sequence[str]) -> CommandLine:
    """`parser.parse`, with the settings of the image of --settings in place of the defaults.

    Raises ValueError for a file that is no image of `generate`, and where the command draws one prompt, none is given
    and the image has several.
    """
    given = parser.parse(words)
    if not getattr(given.options, "settings", None):
        return given
    recorded = _recorded(given.options.settings)
    line = parser.parse(words, {given.options.subcommand: _defaults(given.options, recorded)})
    _replace_lists(given.options, line.options, recorded)
    return line


def _recorded(path: str) -> dict[str, Any]:
    """The options that the settings of an image hold, as they are parsed."""
    options.check_file(path, f"--settings {path}")
    try:
        record = image_settings.read_record(Path(path))
    except ValueError as error:
        raise ValueError(f"--settings {error}") from None
    if record is None:
        raise ValueError(f"--settings {path} is an image without the settings of functional-sd3 {_DRAWN_BY}")
    command = record["command"]
    if command.get("subcommand", _DRAWN_BY) != _DRAWN_BY:
        raise ValueError(
            f"--settings {path} was drawn by {command['subcommand']}, and settings are taken from images of "
            f"{_DRAWN_BY}: functional-sd3 inspect prints its command line"
        )
    parsed = vars(parser.parse(image_settings.words(command)[1:]).options)
    return {name: value for name, value in parsed.items() if name in (*command, "prompt", "given")}


def _defaults(given: argparse.Namespace, recorded: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(given.prompt, list):
        return dict(recorded)
    prompts = recorded["prompt"]
    if given.prompt is None and len(prompts) > 1:
        raise ValueError(f"--settings {given.settings} shows images of {len(prompts)} prompts: give the PROMPT of one")
    return {**recorded, "prompt": prompts[0], "count": 1}


def _replace_lists(given: argparse.Namespace, parsed: argparse.Namespace, recorded: Mapping[str, Any]) -> None:
    """Sets what was given in `parsed`, where argparse adds it to what is recorded; given: parsed without that."""
    for name, value in recorded.items():
        if isinstance(value, list) and getattr(given, name, None):
            setattr(parsed, name, getattr(given, name))
    if getattr(given, "prompts", None) and not given.prompt:
        parsed.prompt = []
    if given.fast and given.cache is None:  # It is a --cache of its own.
        parsed.cache = None
