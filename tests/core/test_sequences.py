"""Runs of equal neighbours: they cover the sequence, each is of one value, and neighbours differ."""

from hypothesis import given
from hypothesis import strategies as st

from functional_sd3.core.sequences import equal_runs


@given(st.lists(st.integers(0, 2)))
def test_runs_cover_a_sequence_are_of_one_value_and_differ_from_their_neighbours(values):
    runs = equal_runs(values)
    assert [index for first, stop in runs for index in range(first, stop)] == list(range(len(values)))
    assert all(len(set(values[first:stop])) == 1 for first, stop in runs)
    assert all(values[stop - 1] != values[stop] for _, stop in runs[:-1])


def test_a_sequence_of_one_value_is_one_run_and_an_empty_one_has_none():
    assert equal_runs("aab") == [(0, 2), (2, 3)] and equal_runs([]) == []
