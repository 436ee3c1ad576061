"""Caches as values: which evaluations of the velocity a run replaces, and their words, `extrapolate:every=2`.

Of a run's steps some are computed always: the warm-up, the last ones, and those at which the velocity becomes another
function (a guidance or a ControlNet starts or ends). A step is one step of the method: where it is replaced, so are all
its evaluations. `flow.caching` and `transformer.block_cache` do it; nothing here needs torch.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Extrapolate:
    """Velocity extrapolated between the steps that compute it: the polynomial in t through the last ones.

    every: between warm-up and end every n-th step is computed, on average: 2 is every other one, 2.5 two of five, 1
    all. Distances grow by one step at a time, 2, 3, ... up to that, since a polynomial leads little farther than its
    points are apart, and above 2 are at most half of what is left. order: of the polynomial, 0 to hold the last
    velocity, through order + 1 computed steps. fitted: the polynomial's difference to the last velocity is multiplied
    by the share of it in [0, 1] that would have been best at the last computed step, of each sample. warmup, final: the
    first and the last steps, which are computed: how many, or below 1 a share of the run's; by default order + 1, one
    more where fitted, and 1. The pattern depends on the number of steps alone.
    """

    every: float = 2.0
    order: int = 1
    warmup: float | None = None
    final: float = 1
    fitted: bool = False

    def __post_init__(self) -> None:
        if not _is_number(self.every) or self.every < 1:
            raise ValueError(f"every {self.every!r} must be a number of at least 1: 2 computes every other step")
        _check_order(self.order)
        if self.fitted and not self.order:
            raise ValueError("fitted is of order 1 or 2: a velocity that is held has no slope to fit")
        _check_ends(self)


@dataclass(frozen=True)
class Tolerance:
    """Velocity extrapolated where its error is predicted to be below a tolerance.

    At each computed step the error of its own extrapolation is measured, |predicted - v| / |v|; the next step is
    replaced where that error, scaled by the distance in t to the power order + 1, is below `tolerance`, at most
    `longest` steps in a row. Each sample decides for itself. The rest as in `Extrapolate`, but that the warm-up has one
    step more at least, which measures the first error.
    """

    tolerance: float = 0.05
    order: int = 1
    longest: int = 3
    warmup: float | None = None
    final: float = 1

    def __post_init__(self) -> None:
        _check_threshold("tolerance", self.tolerance)
        _check_order(self.order)
        if not isinstance(self.longest, int) or self.longest < 1:
            raise ValueError(f"longest {self.longest!r} must be at least 1: steps that are replaced in a row")
        _check_ends(self)


@dataclass(frozen=True)
class FirstBlock:
    """First-block cache: the change that all other blocks make is reused where the first block's has hardly changed.

    An evaluation whose first block changes the image's tokens by r, with |r - r'| / |r'| below `threshold` (sums of
    absolute values; r' at the last evaluation computed whole), adds the change of the other blocks of that evaluation.
    """

    threshold: float = 0.1
    warmup: float | None = None
    final: float = 1

    def __post_init__(self) -> None:
        _check_threshold("threshold", self.threshold)
        _check_ends(self)


@dataclass(frozen=True)
class TeaCache:
    """TeaCache (Liu et al. 2024, arXiv:2411.19108): the change that all blocks make is reused until the modulated input
    of the first has moved by `threshold`.

    d = |m - m'| / |m'| (sums of absolute values; m' at the evaluation before) is rescaled by a polynomial, fitted to
    the change of the output, and summed up since the last evaluation computed whole. polynomial: its coefficients, the
    highest power first; (1, 0) leaves d as it is. `transformer.block_cache.fit` fits them.
    """

    threshold: float = 0.15
    polynomial: tuple[float, ...] = (1.0, 0.0)
    warmup: float | None = None
    final: float = 1

    def __post_init__(self) -> None:
        _check_threshold("threshold", self.threshold)
        object.__setattr__(self, "polynomial", tuple(self.polynomial))
        if not self.polynomial or not all(map(_is_number, self.polynomial)):
            raise ValueError(f"polynomial {self.polynomial!r} must be numbers, the highest power first: (1, 0) is d")
        _check_ends(self)


Cache = Extrapolate | Tolerance | FirstBlock | TeaCache


def is_of_blocks(cache: Cache) -> bool:
    """True if a cache works on the blocks of a network, False if on its velocity."""
    return isinstance(cache, FirstBlock | TeaCache)


def computed_steps(cache: Cache, steps: int, starts: Sequence[int] = (0,)) -> list[bool]:
    """The pattern of a run: True for each step that is computed whatever its values, which is all of `Extrapolate`.

    starts: the steps where the velocity becomes another function; steps before it are of no use to predict it, so a
    warm-up of the least length begins again.
    """
    least, computed = _least_warmup(cache), []
    warmup, final = max(least, _count(cache.warmup or 0, steps)), max(1, _count(cache.final, steps))
    start, first, last, gap, gaps = 0, warmup, 0, 1, 0
    for step in range(steps):
        if step in starts:
            start, first, gap, gaps = step, warmup if step == 0 else least, 1, 0
        due = step - start < first or step >= steps - final
        if isinstance(cache, Extrapolate) and not due:
            widest = math.floor((gaps + 1) * cache.every + 1e-9) - math.floor(gaps * cache.every + 1e-9)
            left = max(2, math.ceil((steps - 1 - last) / 2))
            if step - last == min(gap + 1, widest, left):
                due, gap, gaps = True, step - last, gaps + (gap + 1 >= widest)
        last = step if due else last
        computed.append(due)
    return computed


def parse(text: str) -> Cache:
    """The cache of `KIND[:OPTION=VALUE,...]`, such as `extrapolate:every=2,order=1`; `write` is the inverse.

    Raises ValueError, naming what would be right, for an unknown kind or option and a value that cannot be read.
    """
    kind, _, rest = text.partition(":")
    if kind == "interval":
        raise ValueError("'interval' is a guidance, not a cache: --guidance interval:start=0.2,stop=0.8")
    if kind not in KINDS:
        raise ValueError(f"{kind!r} must be one of {', '.join(KINDS)}")
    make, readers = KINDS[kind]
    given: dict[str, Any] = {}
    for pair in rest.split(",") if rest else []:
        option, equals, value = pair.partition("=")
        if option not in readers:
            known = ", ".join(readers) or "none"
            raise ValueError(f"{option!r} is no option of {kind}, which has {known}")
        if not equals or option in given:
            raise ValueError(f"{option} must be given once, as {option}=VALUE")
        try:
            given[option] = readers[option](value)
        except (ValueError, KeyError):
            raise ValueError(f"{option} cannot be {value!r}, as in {_EXAMPLES[option]}") from None
    return make(**given)


def write(cache: Cache) -> str:
    """The words of a cache; options that have their default are left out."""
    kind = {FirstBlock: "first-block", TeaCache: "teacache", Tolerance: "adaptive"}.get(type(cache), "extrapolate")
    changed = {
        field.name: getattr(cache, field.name)
        for field in dataclasses.fields(cache)
        if getattr(cache, field.name) != field.default
    }
    words = [f"{name}={_word(value)}" for name, value in changed.items()]
    return kind + (":" + ",".join(words) if words else "")


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "/".join(map(_word, value)) if isinstance(value, tuple) else repr(value).removesuffix(".0")


def _hold(**given: Any) -> Extrapolate:
    return Extrapolate(order=0, **given)


def _fast() -> Extrapolate:
    return FAST


def _yes_or_no(text: str) -> bool:
    return {"yes": True, "no": False}[text]


def _coefficients(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split("/")))


_ENDS: Mapping[str, Callable[[str], Any]] = {"warmup": float, "final": float}
KINDS: Mapping[str, tuple[Callable[..., Cache], Mapping[str, Callable[[str], Any]]]] = {
    "extrapolate": (Extrapolate, {"every": float, "order": int, "fitted": _yes_or_no, **_ENDS}),
    "hold": (_hold, {"every": float, **_ENDS}),
    "adaptive": (Tolerance, {"tolerance": float, "order": int, "longest": int, **_ENDS}),
    "first-block": (FirstBlock, {"threshold": float, **_ENDS}),
    "teacache": (TeaCache, {"threshold": float, "polynomial": _coefficients, **_ENDS}),
    "fast": (_fast, {}),
}
"""Kind -> what makes it, and what reads the value of each option."""
_EXAMPLES = {
    "every": "every=2", "order": "order=1", "warmup": "warmup=2", "final": "final=1", "tolerance": "tolerance=0.05",
    "longest": "longest=3", "threshold": "threshold=0.1", "polynomial": "polynomial=2.5/0.4/0",
    "fitted": "fitted=yes",
}  # fmt: skip


def _least_warmup(cache: Cache) -> int:
    if isinstance(cache, Extrapolate):
        return cache.order + 1 + cache.fitted
    return cache.order + 2 if isinstance(cache, Tolerance) else 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_order(order: int) -> None:
    if order not in (0, 1, 2):
        raise ValueError(f"order {order!r} must be 0 (hold), 1 or 2")


def _check_threshold(name: str, value: float) -> None:
    if not _is_number(value) or value < 0:
        raise ValueError(f"{name} {value!r} must be a number of at least 0, where 0 computes every step")


def _count(steps: float, of: int) -> int:
    """A number of steps, or of a share below 1 of so many."""
    return round(steps * of) if steps < 1 else int(steps)


def _check_ends(cache: Cache) -> None:
    least = _least_warmup(cache)
    for name, value, lowest in (("warmup", cache.warmup, least), ("final", cache.final, 1)):
        if value is None or (_is_number(value) and (0 < value < 1 or (value >= lowest and value == int(value)))):
            continue
        raise ValueError(
            f"{name} {value!r} must be the number of steps that are computed, from {lowest} on, or a share of the run "
            "between 0 and 1"
        )


FAST = Extrapolate(every=5, order=1, warmup=0.25, fitted=True)
"""The preset `fast`: 14 of 28 steps computed (docs/sampling.md has its error beside that of half the steps)."""
