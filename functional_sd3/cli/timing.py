"""Seconds that each stage of a run took, and the stage that it is in."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from functional_sd3.cli import report


class Timer:
    """Seconds of each part of a run, in the order they were first met; `stage`: what is being done now."""

    def __init__(self):
        self.last = time.perf_counter()
        self.stage = "loading"
        # The process has done nothing so far but import torch and this program.
        self.parts: dict[str, float] = {"import": time.process_time()}

    def done(self, part: str, device: Any = None) -> None:
        """Add the time since the last call to `part`."""
        if device is not None and device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now

    def summary(self) -> str:
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in self.parts.items())
        return f"{parts}; {sum(self.parts.values()):.2f} s in all"

    @contextmanager
    def named_failures(self, done: Callable[[], str] = str) -> Iterator[None]:
        """Ctrl-C and errors within it carry a note of the stage and of `done()`, such as "12 of 60 written"."""
        try:
            yield
        except KeyboardInterrupt as error:
            error.add_note(f"while {self.stage}" + (f", {done()}" if done() else ""))
            raise
        except Exception as error:
            if done():
                error.add_note(done())
            raise


def progress(total: int) -> Any:
    """A bar of steps, on a terminal only."""
    return report.progress_bar(total)
