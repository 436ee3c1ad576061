"""The parser of all subcommands: built without torch, it suggests the nearest name for one that it does not know."""

import argparse
import difflib
import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import functional_sd3
from functional_sd3.cli import numbers
from functional_sd3.cli.foreign_options import EQUIVALENTS
from functional_sd3.formats.printable import escape, shorten

SUBCOMMANDS = (
    "generate",
    "look",
    "edit",
    "interpolate",
    "app",
    "cache",
    "train",
    "reward",
    "distill",
    "inspect",
    "convert",
    "merge",
    "lora",
    "quantize",
    "evaluate",
    "likelihood",
)
PROGRAM = "functional-sd3"


class Parser(argparse.ArgumentParser):
    """argparse's, with errors of one line that suggest names; options cannot be abbreviated."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Write the message to standard error and exit with status 2."""
        if self._subparsers is not None and "required" in message:
            (below,) = (action for action in self._actions if isinstance(action, argparse._SubParsersAction))
            message += f", one of {', '.join(below.choices)}"
        sys.stderr.write(f"{self.prog}: error: {escape(message)} (see {self.prog} --help)\n")
        raise SystemExit(2)

    def parse_known_args(self, args=None, namespace=None):
        # Before argparse reports as missing what the misspelt option should have given.
        if args is not None and self._subparsers is None:
            self._check_options(args)
        return super().parse_known_args(args, namespace)

    def _check_options(self, words: Sequence[str]) -> None:
        known = self._option_string_actions
        for word in words:
            if word == "--":
                return
            flag = word.partition("=")[0]
            if word.startswith("--") and " " not in word and flag not in known:
                self.error(f"unrecognized arguments: {shorten(flag)}{self._hint(flag)}")

    def _hint(self, flag: str) -> str:
        """The option that is meant by one of another program, or by one that is mistyped."""
        if flag == "--prompt" and any(action.dest == "prompt" for action in self._get_positional_actions()):
            return f'; a prompt is given without an option: {self.prog} "a large red circle on a white background"'
        return suggestion(flag, self._option_string_actions)

    def _check_value(self, action: argparse.Action, value) -> None:
        if action.choices is not None and value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            message = f"invalid choice: {shorten(repr(value))}{suggestion(str(value), map(str, action.choices))}"
            raise argparse.ArgumentError(action, f"{message} (choose from {choices})")


class CommandLine(NamedTuple):
    """The options of a command, `run` among them, and those that every command has."""

    options: argparse.Namespace
    quiet: bool
    debug: bool


def parse(words: Sequence[str], defaults: Mapping[str, Mapping[str, Any]] | None = None) -> CommandLine:
    """The command line that the words are; defaults: of options of a subcommand, in place of its own.

    Exits with status 2, as argparse does, for words that are no command line, and with 0 after --help and --version;
    raises `numbers.OutOfRange` for numbers that an option cannot have.
    """
    parser = build()
    for name, values in (defaults or {}).items():
        _choices(parser)[name].set_defaults(**values)
    if not words:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    namespace = argparse.Namespace(quiet=False, debug=False)
    parsed, rest = parser.parse_known_args(list(words), namespace)
    if rest:
        loose = [word for word in rest if not word.startswith("-")]
        hint = "; a text of several words needs quotes around it" if loose else ""
        flags = parsed.leaf._option_string_actions
        near = suggestion(rest[0], flags) if rest[0].startswith("-") else ""
        parsed.leaf.error(f"unrecognized arguments: {shorten(' '.join(rest))}{near or hint}")
    # A command records its options, and resumes where they are the same: those of all commands are none of them.
    own = {name: value for name, value in vars(parsed).items() if name not in ("leaf", "quiet", "debug")}
    return CommandLine(argparse.Namespace(**own), parsed.quiet, parsed.debug)


def build() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog=PROGRAM,
        description="Stable Diffusion 3.5 as pure functions: images from prompts, training, weights.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {functional_sd3.__version__}")
    _add_common(parser)
    subparsers = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    for name in SUBCOMMANDS:
        module = importlib.import_module(f"functional_sd3.cli.{name}")
        sub = subparsers.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    for leaf in leaves(parser):
        numbers.check_options(leaf)
        _add_common(leaf)
        leaf.set_defaults(leaf=leaf)
    return parser


def subparser(name: str) -> argparse.ArgumentParser:
    """The parser of one subcommand."""
    return _choices(build())[name]


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return action.choices


def leaves(parser: argparse.ArgumentParser) -> Iterable[argparse.ArgumentParser]:
    """The parsers of commands that have no subcommands of their own."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield parser
    for action in below:
        for child in action.choices.values():
            yield from leaves(child)


def suggestion(word: str, names: Iterable[str]) -> str:
    """ "; did you mean NAME?" of the name nearest to `word`, or an empty text."""
    names = list(names)
    if word in ("help", "version"):
        return f"; did you mean --{word}?"
    equivalent = EQUIVALENTS.get(word.strip("-").replace("_", "-").lower()) if word.startswith("-") else None
    if equivalent and equivalent.split()[0] in names:
        return f"; did you mean {equivalent}?"
    # An option typed with one hyphen, or in other letters, is the option.
    close = difflib.get_close_matches(word.lower()[:80], names, 1, 0.6)
    starting = [name for name in names if len(word) > 2 and name.startswith(word)]
    near = starting[:1] or close
    return f"; did you mean {near[0]}?" if near else ""


def _add_common(parser: argparse.ArgumentParser) -> None:
    # Absent, they leave the value that the words before the subcommand gave.
    absent = argparse.SUPPRESS
    quiet = "no notes, no progress and no times; errors stay"
    parser.add_argument("--quiet", action="store_true", default=absent, help=quiet)
    parser.add_argument("--debug", action="store_true", default=absent, help="of an error, the traceback too")
