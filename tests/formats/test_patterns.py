"""Expressions matched without backtracking mean what they mean to Python's `re`, in time that no text can stretch."""

import re
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from functional_sd3.formats import patterns

ATOMS = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-c1]", "^", "$", "1", r"\W", r"[\d.]"])
REPEATS = st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "*?", "+?"])
EXPRESSIONS = st.recursive(
    st.tuples(ATOMS, REPEATS).map("".join),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(st.sampled_from(["(", "(?:"]), inner, st.just(")"), REPEATS).map("".join),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(EXPRESSIONS, st.lists(st.text("ab.1_-", max_size=6), min_size=1, max_size=6))
def test_an_expression_fits_what_re_says_it_fits(expression, texts):
    try:
        reference = re.compile(expression)
    except re.error:  # Anchors that repeat.
        assume(False)
    compiled = patterns.compile(expression)
    for text in texts:
        assert compiled.matches(text) == (reference.fullmatch(text) is not None), (expression, text)


@pytest.mark.parametrize("expression", [
    "(a+)+x", "(.*)*x", ".*.*.*.*x", "(a|a)*x", "(a|aa)+$", "((a?){30})*x", r"(.*\.)?((a*)*b)$",
])  # fmt: skip
def test_no_text_takes_long(expression):
    began = time.process_time()
    compiled = patterns.compile(expression)
    assert not compiled.matches("a" * 20_000 + "!")
    assert time.process_time() - began < 4  # 0.1 s here


@pytest.mark.parametrize("expression, said", [
    ("a(b", "unbalanced"), ("a)b", "unbalanced"), ("*a", "nothing to repeat"), ("a**", "repeat of a repeat"),
    ("(?=a)", "not supported"), ("(?i)a", "not supported"), (r"\bx", "not supported"), (r"(a)\1", "not supported"),
    ("[a", "ends in the middle"), ("a\\", "ends in the middle"), ("[b-a]", "wrong way round"),
    ("a{99999999999}", "too large"), ("a{3,2}", "wrong way round"), ("a" * 1001, "characters"),
    ("(" * 60 + ")" * 60, "nested"), ("((a{50}){50}){50}", "states"), ("a{2000}b{2000}", "states"), ("a*+", "repeat"),
])  # fmt: skip
def test_what_is_not_understood_is_named(expression, said):
    began = time.process_time()
    with pytest.raises(patterns.PatternError, match=said):
        patterns.compile(expression)
    assert time.process_time() - began < 4


def test_a_brace_that_counts_nothing_is_itself():
    assert patterns.compile("a{b}").matches("a{b}") and patterns.compile("{").matches("{")
