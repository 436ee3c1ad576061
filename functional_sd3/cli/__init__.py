"""The command line: `functional-sd3 SUBCOMMAND`, one module a subcommand.

A module has HELP, `add_arguments(parser)` and `run(arguments) -> exit status`. What a person did wrong ends in one line
on standard error and status 1 (2 for a wrong command line), never in a traceback.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

SUBCOMMANDS = (
    "generate",
    "edit",
    "interpolate",
    "train",
    "inspect",
    "convert",
    "merge",
    "lora",
    "quantize",
    "evaluate",
    "likelihood",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` (by default the process's) and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="functional-sd3",
        description="Stable Diffusion 3.5 as pure functions: pictures from prompts, training, weights.",
    )
    subparsers = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    for name in SUBCOMMANDS:
        module = importlib.import_module(f"functional_sd3.cli.{name}")
        sub = subparsers.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    from functional_sd3.formats import notes

    try:
        with notes.printed():
            return parsed.run(parsed)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone (`| head`); the interpreter must not try to flush into it again.
        sys.stdout = None
        return 0
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        print(f"functional-sd3 {parsed.subcommand}: {error.strerror or error}{place}", file=sys.stderr)
        return 1
    except (ValueError, ArithmeticError, MemoryError, RuntimeError) as error:
        message = str(error) or type(error).__name__
        print(f"functional-sd3 {parsed.subcommand}: {message}", file=sys.stderr)
        return 1
