"""The settings inside an image, and the command line that makes it again."""

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from functional_sd3.formats.printable import escape, shorten

if TYPE_CHECKING:
    import argparse

METADATA = "functional_sd3"
"""Keyword of the PNG text chunk that holds the settings an image was made with."""

DESCRIPTION = 0x010E
"""The EXIF tag ImageDescription."""
_DEFAULTS = {"negative": "", "cfg": 5.0, "dtype": "auto"}
_OLD_DIRECT = {"source_cfg": 2.0, "strength": 0.66}
"""Defaults of `edit --direct` for images without a record of them: now every edit records them."""
_POSITIONAL = ("subcommand", "picture", "prompts")
_DRAWING = ("generate", "edit", "interpolate")
_UNRECORDED = {
    "help", "out", "prompts", "batch", "offload", "device", "compile", "preview", "preview_decoder", "quiet", "debug",
    "fast", "settings",
}  # fmt: skip
"""Options that settings never hold: where images are written, the machine, and a preset that another option
holds in full. A command line from a file must not write to a path that the file names."""

Record = dict[str, Any]
"""The content of an image's metadata, as JSON: "request", the `pipeline.describe` of what was drawn; "command",
the settings of the command line that draws it again; "files", "model" and "program", which the request does not know.
Images of earlier versions hold settings alone."""

Settings = dict[str, Any]
"""Option -> value, as JSON: a text or number is `--option value`, a list that for each of its items, True
`--option`; what has its usual value may be left out. "subcommand" (generate, where absent), "picture" and "prompts" are
the words before the options. A new option of a command is recorded by putting it here, and nothing else."""


class Job(NamedTuple):
    """One image: its prompt and seed, and the seed whose noise its own is moved towards by some amount."""

    prompt: str
    seed: int
    variation_seed: int | None = None
    amount: float = 0.0

    def settings(self) -> Settings:
        """Settings of this job for its image, beside the prompt."""
        moved = {} if self.variation_seed is None else {"variation": f"{self.variation_seed}:{self.amount!r}"}
        return {"seed": self.seed, **moved}


def given_options(arguments: Any, names: Sequence[str]) -> Settings:
    """The options that the command line gives: neither absent nor empty; 0 counts as given."""
    values = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in values.items() if value is not False and value not in (None, "", [])}


def joint_settings(jobs: Sequence[Job], settings: Settings) -> Settings:
    """The settings of one image that shows all the jobs, as a grid.

    Where a run was cut short within the images of a prompt, they draw the missing ones of that prompt too.
    """
    counts = Counter(job.prompt for job in jobs)
    count = {} if len(jobs) == 1 else {"count": max(counts.values())}
    return {"prompts": list(counts), **jobs[0].settings(), **count, **settings}


def command(settings: Settings) -> str:
    """The command line that makes an image with these settings again: one line, whatever they hold."""
    return " ".join(map(_quoted, words(settings)))


def read_record(path: Path) -> Record | None:
    """The record written into an image, None where there is none; that of an earlier version is a "command" alone.

    Raises ValueError for a file that is no image, and for settings that are not those of one of this program's drawing
    commands: of all that is returned the "command" is safe to be made a command line of.
    """
    from functional_sd3.formats import json_fields
    from functional_sd3.image import files

    try:
        texts = files.read_texts(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    text = _text(texts)
    if text is None:
        return None
    try:
        record = dict(json_fields.parse_object(text, "the text").values)
        record = record if "command" in record else {"command": record}
        check(record["command"])
    except ValueError as error:
        raise ValueError(f"{path} holds settings that are not this program's: {error}") from None
    return record


def lines(name: str, part: Any, indent: str = "") -> Iterator[str]:
    """A part of a record as text, line by line; what is absent, empty or off is left out."""
    if isinstance(part, dict) and part.get("kind") == "tensor" and "values" in part:
        part = part["values"]
    if part is None or part is False or part in ([], {}, ""):
        return
    if isinstance(part, list) and any(isinstance(each, dict) for each in part):
        part = {"kind": "", **{str(index): each for index, each in enumerate(part)}}
    if not isinstance(part, dict):
        yield f"{indent}{name}: {shorten(part, 300)}"
        return
    kind = part.get("kind") if isinstance(part.get("kind"), str) else ""
    yield f"{indent}{name}:{f' {kind}' if kind else ''}"
    for below, each in part.items():
        if below != "kind":
            yield from lines(below, each, indent + "  ")


def check(settings: Any) -> None:
    """Raises ValueError unless the settings are a command line of `generate`, `edit` or `interpolate`.

    Each name must be a recorded option of that command, and each value one that its parser reads.
    """
    from functional_sd3.cli import parser

    if not isinstance(settings, dict):
        raise ValueError(f"{shorten(repr(settings))} is no table of options")
    subcommand = settings.get("subcommand", "generate")
    if subcommand not in _DRAWING:
        raise ValueError(f"{shorten(repr(subcommand))} is none of {', '.join(_DRAWING)}")
    _check_words(subcommand, settings)
    options = parser.subparser(subcommand)._option_string_actions
    for name, value in settings.items():
        if name in _POSITIONAL:
            continue
        action = options.get(f"--{name.replace('_', '-')}")
        if action is None or name in _UNRECORDED:
            raise ValueError(f"{shorten(repr(name))} is no option that {subcommand} records")
        repeated = isinstance(value, list) and type(action).__name__ == "_AppendAction"
        for item in value if repeated else [value]:
            if not _is_value(item, action):
                raise ValueError(f"{shorten(repr(value))} is no value of --{name.replace('_', '-')}")


def _check_words(subcommand: str, settings: Settings) -> None:
    picture, prompts = settings.get("picture"), settings.get("prompts")
    if subcommand == "edit":
        if not isinstance(picture, str) or prompts is not None:
            raise ValueError("edit changes one image, which they do not name")
        return
    if picture is not None:
        raise ValueError(f"{subcommand} changes no image, but they name one")
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("their prompts are no list of texts")


def _is_value(value: Any, action: "argparse.Action") -> bool:
    """True if `value` is of the kind that the option records, and one that it reads."""
    from functional_sd3.cli.numbers import OutOfRange

    if action.nargs == 0:
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, str if action.type is None else int | float):
        return False
    try:
        read = action.type(str(value)) if callable(action.type) else value
    except (Exception, OutOfRange):
        return False
    return action.choices is None or read in action.choices


def words(settings: Settings) -> list[str]:
    """The words of `command`, the program's name first."""
    subcommand, options = settings.get("subcommand", "generate"), []
    usual = {name: value for name, value in _DEFAULTS.items() if name != "cfg" or subcommand != "edit"}
    if settings.get("direct"):
        settings = {**_OLD_DIRECT, **settings}
    for name, value in settings.items():
        if name in _POSITIONAL or value is False or value == usual.get(name):
            continue
        option = f"--{name.replace('_', '-')}"
        for item in value if isinstance(value, list) else [value]:
            options += _option(option, item)
    places = [settings["picture"]] if "picture" in settings else []
    positional = [str(word) for word in (*places, *settings.get("prompts", []))]
    start = ["functional-sd3", subcommand]
    if any(word.startswith("-") for word in positional):
        return [*start, *options, "--", *positional]
    return [*start, *positional, *options]


def _option(name: str, value: Any) -> list[str]:
    if value is True:
        return [name]
    # A text that starts with a hyphen would be read as an option.
    return [f"{name}={value}"] if str(value).startswith("-") else [name, str(value)]


def _quoted(word: str) -> str:
    r"""The word for a shell; with control characters in it as $'...\n...', which bash and zsh read."""
    if escape(word) == word:
        return shlex.quote(word)
    return "$'" + "".join(_ansi_c(letter) for letter in word) + "'"


def _ansi_c(letter: str) -> str:
    if letter in "\\'":
        return "\\" + letter
    if escape(letter) == letter:
        return letter
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"


def _text(texts: dict[str, str]) -> str | None:
    """The settings in a PNG's text, a GIF's or JPEG's comment or the description in the EXIF of other formats."""
    if METADATA in texts:
        return texts[METADATA]
    others = (texts.get("comment", ""), texts.get("ImageDescription", ""))
    labelled = next((text for text in others if text.startswith(METADATA)), None)
    return None if labelled is None else labelled.removeprefix(METADATA).strip()
