"""Timing two ways of doing the same, fairly: one process, interleaved, warm, the same threads, outputs equal first."""

import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def processor_time() -> float:
    """Seconds of all cores that this process took, and those that it started and that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


class Beside(NamedTuple):
    """Another peer of a row. tolerance: as in `Versus`. version: of its package, which stands in its rows alone, so
    that rows without it are in the same table."""

    run: Callable[[], Any]
    tolerance: float
    version: str = ""


class _More:
    """What is measured of a `Beside`."""

    def __init__(self, beside: Beside, clock: Callable[[], float]) -> None:
        self.beside, self.clock = beside, clock
        self.samples: list[float] = []
        self.first_seconds = self.difference = 0.0

    def compare(self, name: str, mine: Any) -> None:
        """The first call, whose output must be ours to the tolerance."""
        self.first_seconds, other = timed(self.beside.run, clock=self.clock)
        self.difference = relative_difference(mine, other)
        if not self.difference <= self.beside.tolerance:
            raise ValueError(
                f"{name}: the sides differ by {self.difference:.2e}, more than {self.beside.tolerance:.0e}"
            )


class Versus:
    """One row: this project's function beside what a user would run instead, timed by pytest-benchmark.

    pytest-benchmark times ours; the other side runs, and is timed, in the setup of every round, so that both sides see
    the same weather.
    """

    def __init__(
        self,
        benchmark: Any,
        *,
        most: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> None:
        """most: rounds a row is given at most; clock: seconds, as pytest-benchmark's timer; on_row: called with each
        row, as it stands in pytest-benchmark's JSON, when it has been measured."""
        self.benchmark = benchmark
        self.most = most
        self.clock = clock
        self.on_row = on_row

    def __call__(
        self,
        name: str,
        ours: Callable[[], Any],
        theirs: Callable[[], Any] | None,
        *,
        peer: str = "diffusers",
        tolerance: float | None = 1e-4,
        rounds: int = 7,
        repeat: int = 1,
        memory: bool = False,
        grad: bool = False,
        least: bool | Callable[[], Any] = False,
        beside: Mapping[str, Beside] | None = None,
        **facts: Any,
    ) -> None:
        """Times `rounds` rounds of `repeat` calls each. `tolerance`: the largest relative difference of the outputs, a
        tensor each; None where there is nothing to compare. `memory` measures both sides' peak of allocated bytes.
        `least` times the other side's products alone as well, or those given: what no way of writing the same can go
        below. `beside`: more peers by name, in the same rounds, each a row of its own.
        Raises ValueError when the outputs differ by more.
        """
        with torch.set_grad_enabled(grad):
            facts["first_seconds"], mine = timed(ours, clock=self.clock)
            if theirs is not None:
                facts["theirs_first_seconds"], other = timed(theirs, clock=self.clock)
                if tolerance is not None:
                    facts["difference"] = relative_difference(mine, other)
                    if not facts["difference"] <= tolerance:
                        raise ValueError(
                            f"{name}: the sides differ by {facts['difference']:.2e}, more than {tolerance:.0e}"
                        )
                del other
            if memory:
                facts["peak_bytes"] = allocated_peak(ours)
                facts["theirs_peak_bytes"] = allocated_peak(theirs) if theirs else None
            more = {peer: _More(each, self.clock) for peer, each in (beside or {}).items()}
            for each in more.values():
                each.compare(name, mine)
            del mine
            samples: list[float] = []
            bare: Callable[[], Any] | None = (products(theirs) if theirs else None) if least is True else least or None
            alone: list[float] = []

            def other_side() -> None:
                if theirs is not None:
                    samples.append(timed(theirs, repeat, self.clock)[0] / repeat)
                if bare is not None:
                    alone.append(timed(bare, repeat, self.clock)[0] / repeat)
                for each in more.values():
                    each.samples.append(timed(each.beside.run, repeat, self.clock)[0] / repeat)

            rounds = min(rounds, self.most or rounds)
            self.benchmark.pedantic(lambda: [ours() for _ in range(repeat)], setup=other_side, rounds=rounds)
        if alone:
            facts["least"] = alone
        others = {
            peer: {"theirs": each.samples, "difference": each.difference, "theirs_first_seconds": each.first_seconds}
            | ({"version": each.beside.version} if each.beside.version else {})
            for peer, each in more.items()
        }
        if others:
            facts["beside"] = others
        self._finish(row=name, peer=peer, repeat=repeat, theirs=samples, **facts)

    def record(self, name: str, **facts: Any) -> None:
        """A row of figures that are not times of two sides; `facts` as `__call__` writes them."""
        self.benchmark.pedantic(lambda: None, rounds=1)
        self._finish(row=name, theirs=[], **facts)

    def compare(self, name: str, ours: list[float], theirs: list[float], *, peer: str, **facts: Any) -> None:
        """A row of seconds that were measured elsewhere, in other processes."""
        self.benchmark.pedantic(lambda: None, rounds=1)
        first, median, third = statistics.quantiles(ours, n=4) if len(ours) > 1 else ours * 3
        facts = {"row": name, "peer": peer, "theirs": theirs, **facts}
        self.benchmark.extra_info.update(facts)
        self.on_row({"extra_info": facts, "stats": {"median": median, "iqr": third - first}})

    def _finish(self, **facts: Any) -> None:
        self.benchmark.extra_info.update(facts)
        stats = self.benchmark.stats.stats
        self.on_row({"extra_info": facts, "stats": {"median": stats.median, "iqr": stats.iqr}})


def timed(run: Callable[[], Any], repeat: int = 1, clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    """Seconds, and what the last call returned."""
    start = clock()
    for _ in range(repeat):
        result = run()
    return clock() - start, result


_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", _ATTENTION}
_PRODUCTS |= {"convolution_backward", f"{_ATTENTION}_backward"}
# Of a GPU.
_PRODUCTS |= {"_scaled_mm", "_addmm_activation"}
_PRODUCTS |= {f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")}


class _Recorder(TorchDispatchMode):
    """The products that run under it, with what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in _PRODUCTS:
            self.calls.append(partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def products(run: Callable[[], Any]) -> Callable[[], None]:
    """The matrix products, convolutions and attentions of a run, one after the other on the same numbers; of a run that
    differentiates also those of its backward pass."""
    with _Recorder() as recorder:
        run()

    @torch.no_grad()
    def again() -> None:
        for call in recorder.calls:
            call()

    return again


def relative_difference(mine: Any, other: Any) -> float:
    """Norm of the difference over the norm, of tensors or of sequences of them."""
    mine, other = (torch.cat([leaf.detach().double().flatten() for leaf in _tensors(side)]) for side in (mine, other))
    return float((mine - other).norm() / other.norm())


def allocated_peak(run: Callable[[], Any]) -> int:
    """The most bytes of tensors that a call holds at once beyond those it was given, as PyTorch's allocator sees it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _tensors(value: Any) -> Iterable[Tensor]:
    return [value] if isinstance(value, Tensor) else value
