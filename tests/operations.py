"""What runs: the operations of a call, for tests of which kernel is chosen."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted(run: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """What a call returns, and how often each operation ran."""
    with _Watch() as watch:
        found = run()
    return found, watch.names
