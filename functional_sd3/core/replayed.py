"""Values recorded of the blocks of a network in one run, taken again in another, call by call."""

from collections.abc import Mapping, Sequence
from typing import Any


class Replayed:
    """Recorded values by the index of their block, each used once; `what` names them in errors.

    Raises ValueError at once where a run calls a block more often than the recorded one did; where less often, at
    `check_used`.
    """

    def __init__(self, recorded: Mapping[int, Sequence[Any]], what: str) -> None:
        self._recorded, self._what = recorded, what
        self._used = dict.fromkeys(recorded, 0)

    def next_of(self, block: int) -> Any:
        """The next value of a block."""
        index = self._used[block]
        if index == len(self._recorded[block]):
            raise ValueError(f"{self._counts(block)}, and the run calls it more often: replay as many steps")
        self._used[block] += 1
        return self._recorded[block][index]

    def check_used(self) -> None:
        """Raises ValueError where values are left."""
        for block, count in self._used.items():
            if count < len(self._recorded[block]):
                raise ValueError(f"{self._counts(block)}, and the run called it {count} times: replay as many steps")

    def _counts(self, block: int) -> str:
        return f"{len(self._recorded[block])} {self._what} of block {block} were recorded"
