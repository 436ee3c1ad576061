"""Attention in bfloat16 by oneDNN's products: as exact as the scores allow, in blocks of any size."""

import pytest
import torch

from functional_sd3.core import attention, prng
from functional_sd3.kernels import attention_products
from tests import choices

SCALE = 0.25


def inputs(size=1.0, tokens=150, keys=210):
    keyed = zip(prng.split(prng.key(0), 3), (tokens, keys, keys), (size, size, 1.0), strict=True)
    return [(factor * prng.normal(key, (2, 3, count, 16))).bfloat16() for key, count, factor in keyed]


def error(found, query, key, value):
    exact = attention.softmax_attention.formula(query.double(), key.double(), value.double(), None, False, SCALE)
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("size", [1.0, 4.0, 8.0])
def test_large_scores_lose_less_than_by_the_formula_which_rounds_them(size):
    given = inputs(size)
    found = error(attention_products.untracked(*given, None, False, SCALE), *given)
    assert found < 1.2e-2
    rounded = error(attention.softmax_attention.formula(*given, None, False, SCALE), *given)
    assert found < (1.1 if size == 1 else 0.7) * rounded


@pytest.mark.parametrize("scores", [1, 100 * 210, 150 * 210, 2 * 150 * 210])
def test_blocks_of_rows_and_heads_leave_the_values_as_they_are(scores, monkeypatch):
    given = inputs()
    expected = attention_products.untracked(*given, None, False, SCALE)
    monkeypatch.setattr(attention_products, "SCORES", scores)
    found = attention_products.untracked(*given, None, False, SCALE)
    assert float((found - expected).float().norm() / expected.float().norm()) < 1e-3


def test_heads_are_merged_without_a_copy():
    attended = attention_products.untracked(*inputs(), None, False, SCALE)
    assert attention.merge_heads(attended).data_ptr() == attended.data_ptr()


def test_it_runs_where_the_processors_choice_is_so_and_for_nothing_else(monkeypatch):
    query, key, value = inputs()
    fits = lambda *given: attention_products.fits(*given, SCALE)  # noqa: E731
    choices.use(monkeypatch)
    assert fits(query, key, value, None, False)
    assert not fits(query, key, value, torch.zeros(210), False) and not fits(query, key, value, None, True)
    assert not fits(query.float(), key.float(), value.float(), None, False)
    assert not fits(query, key[:, :1], value[:, :1], None, False)
    monkeypatch.setattr(attention_products, "SMALLEST", 2 * 3 * 150 * 210 + 1)
    assert not fits(query, key, value, None, False)
    choices.use(monkeypatch, choices.ALL)
    assert not fits(query, key, value, None, False)
