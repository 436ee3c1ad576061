"""`--settings IMAGE`: the settings that an image was drawn with, as the defaults of a command line."""

import argparse
from pathlib import Path
from typing import Any

from functional_sd3.cli import image_settings

_DRAWN_BY = "generate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--settings",
        metavar="IMAGE",
        help="an image that this program drew: its prompt and options, but for those that are given here",
    )


def namespace(path: str) -> argparse.Namespace:
    """The recorded options of an image drawn by `generate`, parsed: those in its settings alone.

    Raises ValueError for a file that is no such image.
    """
    from functional_sd3.cli import options, parser

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
    parsed = parser.subparser(_DRAWN_BY).parse_args(image_settings.words(command)[2:])
    kept = {name: value for name, value in vars(parsed).items() if name in (*command, "prompt", "given")}
    return argparse.Namespace(**kept)


def set_defaults(given: argparse.Namespace, recorded: argparse.Namespace) -> None:
    """Makes the recorded options the defaults of the parser of `generate` or `look`.

    given: the options without them. Raises ValueError where the command draws one prompt, none is given, and the image
    has several.
    """
    values = dict(vars(recorded))
    if not isinstance(given.prompt, list):
        prompts = values.pop("prompt")
        values.pop("count", None)
        if given.prompt is None and len(prompts) > 1:
            raise ValueError(
                f"--settings {given.settings} shows images of {len(prompts)} prompts: give the PROMPT of one"
            )
        values["prompt"] = prompts[0]
    given.leaf.set_defaults(**values)


def merge(given: argparse.Namespace, parsed: argparse.Namespace, recorded: argparse.Namespace) -> None:
    """Lets what was given replace what is recorded, where the parser adds the one to the other, in `parsed`.

    given: the options without recorded defaults.
    """
    for name, value in vars(recorded).items():
        own: Any = getattr(given, name, None)
        if isinstance(value, list) and own and name != "given":
            setattr(parsed, name, own)
    if getattr(given, "prompts", None) and not given.prompt:
        parsed.prompt = []
    if given.fast and given.cache is None:  # It is a --cache of its own.
        parsed.cache = None
