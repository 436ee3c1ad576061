"""The command line: `functional-sd3 SUBCOMMAND`, one module a subcommand.

A module has HELP, `add_arguments(parser)` and `run(arguments) -> exit status`, and imports torch within `run` only,
after the command line was checked. A user's mistake ends in one line on standard error and status 1 (2 for words
that are no command line), Ctrl-C in 130; a traceback is printed with --debug alone.
"""

import sys
from collections.abc import Sequence

from functional_sd3.cli import failures, parser, processes, recorded, report
from functional_sd3.cli.parser import SUBCOMMANDS

__all__ = ["SUBCOMMANDS", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` (by default the process's) and returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = " ".join([parser.PROGRAM, *[word for word in words if word in SUBCOMMANDS][:1]])
    given = None
    with failures.noted_interrupts() as interrupts:
        try:
            given = recorded.parse(words)
            with report.printing(quiet=given.quiet):
                processes.check_command(given.options)
                return given.options.run(given.options)
        except BrokenPipeError:
            # The reader of a pipe has ended (`| head`); the interpreter must not try to flush into it again.
            sys.stdout = None
            return 0
        except (Exception, KeyboardInterrupt) as error:
            # Extension modules may turn a KeyboardInterrupt in their import into an error of their own.
            interrupted = interrupts and isinstance(error, ImportError | SystemError)
            return failures.report_failure(KeyboardInterrupt() if interrupted else error, name, given)
