"""Agreement between the processes of one run: flags, values and errors of one on all of them.

Processes that work together call the same collectives in the same order, so whether to stop, to save or to fail is
decided together: an error of one would leave the others waiting for it. Of one process everything here is immediate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from functional_sd3.parallel.mesh import ONE_PROCESS, Mesh
from functional_sd3.parallel.watch import Watch

T = TypeVar("T")


class ElsewhereError(ValueError):
    """An error of another process, which reports it."""


def is_on_all(error: BaseException | None) -> bool:
    """True for an error by which all processes end, or one that it caused: none of them waits for this one."""
    while error is not None:
        if isinstance(error, ElsewhereError) or getattr(error, _ON_ALL, False):
            return True
        error = error.__cause__
    return False


_ON_ALL = "is_on_all_processes"


@dataclass(frozen=True)
class Processes:
    """The processes of a run, on their mesh; watch: by which the others end when one is lost, None for none."""

    mesh: Mesh = ONE_PROCESS
    device: torch.device = torch.device("cpu")
    watch: Watch | None = None

    @property
    def is_first(self) -> bool:
        """True in the one that writes and reports."""
        return self.mesh.rank == 0

    @property
    def is_alone(self) -> bool:
        """True if there are no others."""
        return self.mesh.size() == 1

    def any(self, flag: bool) -> bool:
        """True on all of them if `flag` is on one."""
        if self.is_alone:
            return flag
        flags = torch.tensor([int(flag)], dtype=torch.int32, device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.mesh.group())
        return bool(flags.item())

    def gather(self, value: T) -> list[T]:
        """The values of all, in the order of their ranks."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.mesh.size()
        dist.all_gather_object(values, value, group=self.mesh.group())
        return values

    def together(self, fn: Callable[[], T]) -> T:
        """fn() of each process; where one raises, all do: the first that did its own error, the others ElsewhereError.

        fn must not wait for the other processes.
        """
        if self.is_alone:
            return fn()
        error: BaseException | None = None
        value: Any = None
        try:
            value = fn()
        except BaseException as raised:
            error = raised
        if not self.any(error is not None):
            return value
        failures = self.gather(None if error is None else str(error) or type(error).__name__)
        rank = next(index for index, failure in enumerate(failures) if failure is not None)
        if error is not None and rank == self.mesh.rank:
            setattr(error, _ON_ALL, True)
            raise error
        raise ElsewhereError(f"process {rank}: {failures[rank]}") from error

    def fail(self, error: BaseException) -> NoReturn:
        """Raises an error that all have: in the first, which reports it, and in the others as ElsewhereError."""
        if self.is_first:
            setattr(error, _ON_ALL, True)
            raise error
        raise ElsewhereError(f"process 0: {error}") from error

    def reached(self, step: int) -> None:
        """Say to the watch that this process has done a step."""
        if self.watch is not None:
            self.watch.reached(step)

    def first(self, fn: Callable[[], T]) -> T:
        """fn() of process 0 on all of them, while they wait; its errors as `together`. The value is pickled."""
        if self.is_alone:
            return fn()
        value = self.together(fn if self.is_first else lambda: None)
        return self.gather(value)[0]  # type: ignore[return-value]

    def in_turn(self, fn: Callable[[bool], T]) -> T:
        """fn(True) of process 0, then fn(False) of the others, which may read what it wrote; errors as `together`."""
        if self.is_alone:
            return fn(True)
        value = self.together(lambda: fn(True) if self.is_first else None)
        rest = self.together(lambda: None if self.is_first else fn(False))
        return value if self.is_first else rest  # type: ignore[return-value]


ALONE = Processes()
