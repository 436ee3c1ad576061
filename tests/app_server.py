"""The page of `functional-sd3 app` served in a thread, for tests of its API and in a browser."""

import contextlib
import gc
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

from functional_sd3.cli import parser
from functional_sd3.cli.app import model, sharing

DRAWING = "functional-sd3 app: drawing"
"""Name of the threads that compute."""


class Server(NamedTuple):
    served: model.Served
    url: str
    folder: str
    page: object


def served_model(*words: str) -> model.Served:
    """The model of `functional-sd3 app WORDS`."""
    return model.serve(parser.parse(["app", *words]).options)


@contextlib.contextmanager
def serving(*words: str) -> Iterator[Server]:
    """`functional-sd3 app WORDS` at a free port of 127.0.0.1."""
    kept = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # Of Gradio and what it stands on; the process of a command would print or ignore them.
        warnings.simplefilter("ignore")
        sharing.environment(folder)
        try:
            from functional_sd3.cli.app import page, server

            served = served_model(*words)
            made = page.build(served)
            with server.listening("127.0.0.1", 0) as bound, server.running(made, bound, folder, served.limits) as run:
                yield Server(served, run.url, folder, made)
        finally:
            os.environ.clear()
            os.environ.update(kept)
            # Event loops that Gradio does not close, which would be found in a later test, as its failure.
            gc.collect()


def drawing() -> list[threading.Thread]:
    """The threads that compute."""
    return [thread for thread in threading.enumerate() if thread.name == DRAWING]


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Return once the condition holds; an AssertionError says what did not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)
