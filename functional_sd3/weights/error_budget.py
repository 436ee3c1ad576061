"""Choice of the weights that keep floats so that quantised parameters are off by no more than a limit."""

from collections.abc import Callable
from typing import NamedTuple

from functional_sd3.core import tree
from functional_sd3.core.types import Params
from functional_sd3.weights import quantize


class Budget(NamedTuple):
    """params: as stored, with some weights in floats. error: of them, at most the limit. before: of what was given.
    kept: path of a weight in floats -> the error with this weight alone quantised, in the order in which they were
    taken back."""

    params: Params
    error: float
    before: float
    kept: dict[str, float]


def within_error(floats: Params, stored: Params, error: Callable[[Params], float], limit: float) -> Budget:
    """`stored` with as few weights of `floats` as bring `error` to at most `limit`.

    error: of any such tree against floats, such as a velocity's on a fixed batch; 0 for the floats themselves. It is
    measured with each weight alone quantised; weights are taken back in the order of its square for each number that
    they have (errors of layers are nearly independent, so that squares add up), as many as bisection says. The trees
    that are measured are whole, so that the result's error is a measured one, too.
    Raises ValueError for a limit below 0, or where the floats are off by more than it, as those of 16 bits may be.
    """
    if not limit >= 0:
        raise ValueError(f"limit {limit:g} must be at least 0")
    before = error(stored)
    if before <= limit:
        return Budget(stored, before, before, {})
    paths = [f"{path.rpartition('.')[0]}.weight" for path in quantize.stored_scales(stored)]
    numbers = {path: leaf.numel() for path, leaf in tree.flatten_paths(stored).items()}
    alone = {path: error(quantize.with_floats(stored, floats, set(paths) - {path})) for path in paths}
    order = sorted(paths, key=lambda path: -(alone[path] ** 2) / numbers[path])
    # The error is above the limit with `low` of them in floats, and not with `high`.
    low, high = 0, len(order)
    best = quantize.with_floats(stored, floats, order)
    least = error(best)
    if not least <= limit:
        raise ValueError(f"limit {limit:g} cannot be met: with all weights in floats the error is {least:.2e}")
    while high - low > 1:
        middle = (low + high) // 2
        trial = quantize.with_floats(stored, floats, order[:middle])
        measured = error(trial)
        if measured <= limit:
            high, best, least = middle, trial, measured
        else:
            low = middle
    return Budget(best, least, before, {path: alone[path] for path in order[:high]})
