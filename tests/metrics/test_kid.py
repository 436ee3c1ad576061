"""The kernel inception distance: definition, subsets, and properties for any features."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3.core import prng
from functional_sd3.metrics import kid
from tests.metrics import references

seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, n: int, width: int = 6) -> torch.Tensor:
    return prng.normal(prng.key(seed), (n, width), torch.float64)


def by_definition(x: numpy.ndarray, y: numpy.ndarray) -> float:
    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    within = [
        numpy.mean([kernel(a, b) for i, a in enumerate(part) for j, b in enumerate(part) if i != j]) for part in (x, y)
    ]
    return sum(within) - 2 * numpy.mean([kernel(a, b) for a in x for b in y])


@given(seeds, st.integers(2, 12), st.integers(2, 12))
@settings(max_examples=30)
def test_the_full_estimate_is_the_definition_and_symmetric(seed, n, m):
    x, y = draw(seed, n), draw(seed ^ 1, m)
    assert float(kid.unbiased(x, y)) == pytest.approx(by_definition(x.numpy(), y.numpy()), rel=1e-9, abs=1e-12)
    assert float(kid.unbiased(x, y)) == pytest.approx(float(kid.unbiased(y, x)), rel=1e-9, abs=1e-12)


@given(seeds)
@settings(max_examples=20)
def test_order_and_a_common_rotation_change_nothing(seed):
    x, y = draw(seed, 20), draw(seed ^ 1, 30)
    rotation, _ = torch.linalg.qr(draw(seed ^ 2, 6))
    wanted = float(kid.unbiased(x, y))
    assert float(kid.unbiased(x.flip(0), y)) == pytest.approx(wanted, abs=1e-12)
    assert float(kid.unbiased(x @ rotation, y @ rotation)) == pytest.approx(wanted, abs=1e-10)


def test_blocks_add_up_to_the_whole(monkeypatch):
    x, y = draw(1, 70), draw(2, 45)
    whole = kid.unbiased(x, y)
    monkeypatch.setattr(kid, "_ROWS", 16)
    torch.testing.assert_close(kid.unbiased(x, y), whole, rtol=1e-12, atol=1e-12)


def test_the_estimate_has_no_bias():
    values = torch.stack([kid.unbiased(draw(2 * seed, 20), draw(2 * seed + 1, 20)) for seed in range(400)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 20
    assert (values < 0).any()


def test_it_can_be_differentiated():
    x, y = draw(1, 5), draw(2, 4)
    assert torch.autograd.gradcheck(kid.unbiased, (x.requires_grad_(), y.requires_grad_()))


def test_subsets_depend_on_the_key_and_are_drawn_without_repetition():
    x, y = references.features(60, 16, 1), references.features(50, 16, 2)
    key = prng.key(3)
    once = kid.estimates(x, y, key, subsets=7, size=20)
    assert once.shape == (7,) and torch.equal(once, kid.estimates(x, y, key, subsets=7, size=20))
    assert not torch.equal(once, kid.estimates(x, y, prng.key(4), subsets=7, size=20))
    assert len(once.unique()) == 7
    assert kid.distance(x, y, key, subsets=7, size=20) == pytest.approx(float(once.mean()))
    # Subsets of everything are everything.
    whole = kid.estimates(x[:50], y, key, subsets=2, size=50)
    torch.testing.assert_close(whole, kid.unbiased(x[:50], y).expand(2), rtol=1e-9, atol=1e-12)


def test_the_mean_over_subsets_is_near_the_full_estimate():
    x, y = references.features(300, 16, 1), references.features(250, 16, 2)
    estimates = kid.estimates(x, y, prng.key(0), subsets=60, size=100)
    error = float(estimates.std()) / 60**0.5
    assert abs(float(estimates.mean() - kid.unbiased(x, y))) < 4 * error


def test_small_sets_are_used_whole_without_a_size():
    x, y = draw(1, 30), draw(2, 30)
    assert kid.distance(x, y, prng.key(0), subsets=1) == pytest.approx(float(kid.unbiased(x, y)), abs=1e-12)
    with pytest.raises(ValueError, match="subsets of 31 cannot be drawn from 30 and 30 samples"):
        kid.distance(x, y, prng.key(0), size=31)


def test_wrong_features_are_refused():
    with pytest.raises(ValueError, match=r"\[3, 6\] and \[3, 5\]"):
        kid.unbiased(draw(0, 3), draw(0, 3, 5))
    with pytest.raises(ValueError, match="1 and 3 samples have no distinct pairs"):
        kid.unbiased(draw(0, 1), draw(0, 3))
    with pytest.raises(ValueError, match="floating"):
        kid.distance(draw(0, 3).long(), draw(0, 3), prng.key(0))
