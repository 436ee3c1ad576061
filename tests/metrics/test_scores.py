"""Inception score, CMMD and CLIP score: closed forms and definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3.core import prng
from functional_sd3.metrics import clip_score, cmmd, inception_score

seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return prng.normal(prng.key(seed), shape, torch.float64)


def test_certain_and_evenly_spread_predictions_score_the_number_of_classes():
    logits = 1e4 * torch.eye(7).repeat(3, 1)
    assert inception_score.score(logits, splits=3) == pytest.approx((7, 0), abs=1e-9)


def test_equal_predictions_score_one():
    assert inception_score.score(draw(1, 1, 9).expand(20, 9), splits=4) == pytest.approx((1, 0), abs=1e-12)


def test_two_kinds_of_images_have_the_closed_form():
    p = 0.9
    logits = torch.tensor([[p, 1 - p], [1 - p, p]]).log()
    wanted = 2 * math.exp(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert inception_score.score(logits, splits=1).mean == pytest.approx(wanted, rel=1e-6)


@given(seeds, st.integers(4, 30), st.integers(1, 4))
@settings(max_examples=30)
def test_the_score_lies_between_one_and_the_classes_and_adding_to_all_logits_changes_nothing(seed, n, splits):
    logits = 4 * draw(seed, n, 5)
    actual = inception_score.score(logits, splits=splits)
    assert 1 - 1e-12 <= actual.mean <= 5 and actual.deviation >= 0
    assert inception_score.score(logits + 3, splits=splits) == pytest.approx(actual, abs=1e-9)


def test_impossible_classes_contribute_nothing():
    logits = torch.cat([draw(1, 12, 3), torch.full((12, 2), -math.inf, dtype=torch.float64)], 1)
    assert inception_score.score(logits) == pytest.approx(inception_score.score(logits[:, :3]), rel=1e-12)


def test_a_key_shuffles():
    logits = 1e4 * torch.eye(4).repeat_interleave(50, 0)
    assert inception_score.score(logits, splits=4).mean == pytest.approx(1)
    shuffled = inception_score.score(logits, splits=4, key=prng.key(0))
    assert shuffled.mean > 3.5 and shuffled == inception_score.score(logits, splits=4, key=prng.key(0))


def test_too_few_images_cannot_be_split():
    with pytest.raises(ValueError, match="3 images cannot be scored in 10 splits"):
        inception_score.score(draw(0, 3, 5))


@given(seeds, st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=30)
def test_cmmd_is_its_definition(seed, n, m):
    x, y = draw(seed, n, 6), draw(seed ^ 1, m, 6) + 1
    a, b = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)

    def mean(p, q):
        return torch.exp(-torch.cdist(p, q).square() / (2 * 10.0**2)).mean()

    wanted = 1000 * float(mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert cmmd.distance(x, y) == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert cmmd.distance(x, y) == pytest.approx(cmmd.distance(y, 5 * x), rel=1e-9, abs=1e-12)


def test_cmmd_of_opposite_points_has_the_closed_form():
    x = torch.tensor([[1.0, 0.0]])
    assert cmmd.distance(x, -x) == pytest.approx(1000 * 2 * (1 - math.exp(-4 / 200)), rel=1e-12)


def test_cmmd_of_equal_sets_is_zero_in_any_order_and_any_blocks(monkeypatch):
    x = draw(1, 40, 8).float()
    y = draw(2, 30, 8).float()
    whole = cmmd.distance(x, y)
    monkeypatch.setattr(cmmd, "_ROWS", 16)
    assert cmmd.distance(x, y) == pytest.approx(whole, rel=1e-9)
    for seed in range(20):
        same = draw(seed, 30, 8)
        assert 0 <= cmmd.distance(same, same[prng.permutation(prng.key(seed), 30)]) < 1e-9


def test_cmmd_refuses_embeddings_without_direction():
    with pytest.raises(ValueError, match="an embedding of y is 0"):
        cmmd.distance(draw(0, 3, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\[3, 4\] and \[3, 5\]"):
        cmmd.distance(draw(0, 3, 4), draw(0, 3, 5))


def test_the_clip_score_is_a_hundred_cosines_never_negative():
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 4.0]])
    texts = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(clip_score.pairs(images, texts), torch.tensor([100.0, 0.0, 60.0]).double())
    assert clip_score.score(images, texts) == pytest.approx(160 / 3)
    with pytest.raises(ValueError, match=r"\[3, 2\] and \[2, 2\]"):
        clip_score.score(images, texts[:2])
