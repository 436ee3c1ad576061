"""How long each part of a run took, and how far it is."""

import time
from typing import Any


class Timer:
    """Seconds of each part of a run, in the order they were first met."""

    def __init__(self):
        self.last = time.perf_counter()
        # What the process has computed so far is the import of torch and of this program.
        self.parts: dict[str, float] = {"import": time.process_time()}

    def done(self, part: str, device: Any = None) -> None:
        """What has passed since the last call was spent on `part`."""
        if device is not None and device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now

    def summary(self) -> str:
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in self.parts.items())
        return f"{parts}; {sum(self.parts.values()):.2f} s in all"


def progress(total: int) -> Any:
    """A bar of steps, on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=total, unit="step", leave=False, disable=None)
