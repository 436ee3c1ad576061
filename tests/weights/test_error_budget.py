"""Weights that stay floats so that an error stays below a limit: against errors that are known in advance."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3.core import prng, tree
from functional_sd3.weights import error_budget, quantize

FLOATS = {"blocks": [{"weight": prng.normal(prng.key(index), (4 + index, 8))} for index in range(6)]}
STORED = quantize.quantize(FLOATS)
PATHS = [f"blocks.{index}.weight" for index in range(6)]
SIZES = [8 * (4 + index) for index in range(6)]


def known(squares, floor=0.0):
    """The error of a tree: the root of the sum of the squares of its quantised weights."""

    def error(params):
        leaves = tree.flatten_paths(params)
        quantised = [leaves[path].dtype == torch.int8 for path in PATHS]
        return math.sqrt(
            floor**2 + sum(one for one, is_quantised in zip(squares, quantised, strict=True) if is_quantised)
        )

    return error


@given(st.lists(st.floats(1e-6, 1), min_size=6, max_size=6), st.floats(1e-3, 3))
@settings(max_examples=50)
def test_as_few_weights_as_needed_stay_floats_the_worst_for_their_size_first(squares, limit):
    error = known(squares)
    found = error_budget.within_error(FLOATS, STORED, error, limit)
    order = sorted(range(6), key=lambda index: -squares[index] / SIZES[index])
    kept = list(found.kept)
    assert kept == [PATHS[index] for index in order[: len(kept)]]
    assert found.error == error(found.params) <= limit and found.before == error(STORED)
    if kept:
        fewer = quantize.with_floats(STORED, FLOATS, kept[:-1])
        assert error(fewer) > limit
    leaves, floats, stored = map(tree.flatten_paths, (found.params, FLOATS, STORED))
    for index, path in enumerate(PATHS):
        assert leaves[path] is (floats if path in kept else stored)[path]
        assert (path.replace("weight", "scale") in leaves) == (path not in kept)
        if path in kept:
            assert found.kept[path] == pytest.approx(math.sqrt(squares[index]))


def test_a_limit_that_nothing_meets_is_named():
    with pytest.raises(ValueError, match=r"limit 0.1 cannot be met: with all weights in floats the error is 2.00e-01"):
        error_budget.within_error(FLOATS, STORED, known([1.0] * 6, floor=0.2), 0.1)
    for limit in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="limit .* must be at least 0"):
            error_budget.within_error(FLOATS, STORED, known([1.0] * 6), limit)
    assert not quantize.is_quantized(error_budget.within_error(FLOATS, STORED, known([1.0] * 6), 0.0).params)
