"""Wall time of the parts of a run, separated by when each component is fetched and each step ends."""

import time

import torch

from functional_sd3.core.types import Params
from functional_sd3.pipeline.components import Components, changed


class Clock:
    """Seconds of each part, in the order in which they began; a device has finished when a part ends."""

    def __init__(self, part: str):
        self.seconds: dict[str, float] = {}
        self.part, self.since = part, _now()

    def begin(self, part: str) -> float:
        """End the part before and begin another; returns the seconds since the last call."""
        now = _now()
        taken = now - self.since
        self.seconds[self.part] = self.seconds.get(self.part, 0.0) + taken
        self.part, self.since = part, now
        return taken


def timed(components: Components, clock: Clock) -> Components:
    """The components; fetching one begins the part of its name."""

    def begin(name: str, params: Params) -> Params:
        clock.begin(name)
        return params

    def read(name: str) -> Params:
        assert callable(components)
        clock.begin(name)
        return components(name)

    return read if callable(components) else changed(components, begin)


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
