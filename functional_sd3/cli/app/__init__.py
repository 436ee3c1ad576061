"""A page in the browser that draws images of prompts (needs the extra `app`: Gradio)."""

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
import threading

from functional_sd3.cli import options, preview, report
from functional_sd3.cli.app import limits, sharing

HELP = "a page in the browser that draws images of prompts"
PORT = 7860
LOOPBACK = "127.0.0.1"
_ENDING = 5.0
"""Seconds that a run has for its step when the page ends."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host",
        default=LOOPBACK,
        help=f"address to listen at (default {LOOPBACK}: this machine alone can see the page)",
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"port to listen at, 0 for a free one (default {PORT})")
    options.add_model(parser)
    parser.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="[WORD=]FILE",
        help="a textual inversion, which prompts may use. May be repeated",
    )
    preview.add_decoder(parser)
    limits.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    options.check_params(arguments.params)
    if not arguments.host.strip():
        # A socket takes it for every address of this machine.
        raise ValueError(f"--host {arguments.host!r} must be an address, such as {LOOPBACK}, or 0.0.0.0 for every one")
    options.check_without(arguments.without)
    options.check_swap(arguments)
    if importlib.util.find_spec("gradio") is None:
        raise ModuleNotFoundError(
            'the page needs Gradio, which is not installed: pip install "functional_sd3[app]"', name="gradio"
        )
    # As Ctrl-C does: what was uploaded is removed.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        _serve(arguments)
    except (KeyboardInterrupt, SystemExit) as error:
        from functional_sd3.cli.app import streaming

        if not streaming.end_all(_ENDING):
            # An interpreter that ends while torch computes in another thread aborts the process.
            report.error("\nstopped")
            os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 130)
        raise
    return 0


def _serve(arguments: argparse.Namespace) -> None:
    # Gradio keeps what is uploaded and made in a folder that all of its pages on a machine share; this one has its own.
    with tempfile.TemporaryDirectory(prefix="functional-sd3-app-") as folder:
        sharing.environment(folder)
        from functional_sd3.cli.app import model, page, server

        served = model.serve(arguments)
        with server.listening(arguments.host, arguments.port) as socket:
            with server.running(page.build(served), socket, folder, served.limits) as running:
                for line in sharing.lines(arguments.host, running.url, list(served.loras)):
                    report.message(line)
                report.say(running.url)
                running.wait()
