"""The operations of a call, for tests of which kernel is chosen."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def counted(run: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """The result of a call, and how often each operation ran in it, by its name without the namespace.

    By the profiler, since kernels step aside under a dispatch mode.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        found = run()
    return found, Counter(event.name.split("::")[-1] for event in profiler.events())
