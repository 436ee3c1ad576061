"""Precision, recall, density and coverage: their definitions, extremes and invariances."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3.core import prng
from functional_sd3.metrics import density_coverage, neighbours, precision_recall

seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, n: int, width: int = 3) -> torch.Tensor:
    return 5 + prng.normal(prng.key(seed), (n, width), torch.float64)


def by_definition(real: numpy.ndarray, generated: numpy.ndarray, k: int) -> tuple[float, float, float, float]:
    def radii(points):
        apart = numpy.linalg.norm(points[:, None] - points[None], axis=-1)
        return numpy.sort(apart, axis=1)[:, k]

    apart = numpy.linalg.norm(real[:, None] - generated[None], axis=-1)
    in_real, in_generated = apart <= radii(real)[:, None], apart <= radii(generated)[None]
    strictly = apart < radii(real)[:, None]
    return (
        in_real.any(0).mean(),
        in_generated.any(1).mean(),
        strictly.sum(0).mean() / k,
        strictly.any(1).mean(),
    )


@given(seeds, st.integers(6, 25), st.integers(6, 25), st.integers(1, 5), st.floats(0, 3))
@settings(max_examples=60)
def test_all_four_are_their_definitions(seed, n, m, k, shift):
    real, generated = draw(seed, n), draw(seed ^ 1, m) + shift
    wanted = by_definition(real.numpy(), generated.numpy(), k)
    actual = precision_recall.score(real, generated, neighbour=k) + density_coverage.score(real, generated, neighbour=k)
    assert actual == pytest.approx(wanted, abs=1e-12)


@given(seeds)
@settings(max_examples=20)
def test_precision_of_one_set_is_recall_of_the_other_and_rotation_changes_nothing(seed):
    x, y = draw(seed, 15), draw(seed ^ 1, 20)
    rotation, _ = torch.linalg.qr(draw(seed ^ 2, 3) - 5)
    actual = precision_recall.score(x, y)
    assert tuple(precision_recall.score(y, x)) == (actual.recall, actual.precision)
    assert precision_recall.score(x @ rotation, y @ rotation) == actual
    assert density_coverage.score(x @ rotation, y @ rotation) == density_coverage.score(x, y)


@pytest.mark.parametrize("copies", [1, 6])
def test_equal_sets_are_perfect_and_far_ones_hopeless(copies):
    # With copies, every radius is 0: equal points must be at distance 0 exactly, not at that of a rounding error.
    real = (1e3 * draw(1, 30, 40).float()).repeat(copies, 1)
    assert precision_recall.score(real, real.flip(0)) == (1.0, 1.0)
    if copies == 1:
        actual = density_coverage.score(real, real)
        assert actual.coverage == 1.0 and actual.density == pytest.approx(1.0)
    assert precision_recall.score(real, real + 1e6) == (0.0, 0.0)
    assert density_coverage.score(real, real + 1e6) == (0.0, 0.0)


def test_an_outlier_raises_precision_but_not_density():
    real, generated = draw(1, 100, 2), draw(2, 100, 2) + 6
    outlier = torch.tensor([[13.0, 13.0]], dtype=torch.float64)
    with_one = torch.cat([real, outlier])
    assert precision_recall.score(with_one, generated).precision > 0.9
    assert density_coverage.score(with_one, generated).density < 0.5


def test_blocks_are_one_matrix_of_distances(monkeypatch):
    x, y = draw(1, 50), draw(2, 37)
    scores = precision_recall.score(x, y), density_coverage.score(x, y)
    monkeypatch.setattr(neighbours, "_ROWS", 7)
    torch.testing.assert_close(torch.cat(list(neighbours.blocks(x, y))), torch.cdist(x, y), rtol=1e-9, atol=1e-9)
    assert scores == (precision_recall.score(x, y), density_coverage.score(x, y))


def test_equal_points_are_at_distance_zero_exactly():
    x = 1e3 * draw(1, 40, 300).float()
    both = torch.cat([x, x])
    apart = torch.cat(list(neighbours.blocks(both, both.roll(7, 0))))
    assert (apart == 0).sum() == 2 * len(both)
    assert not neighbours.radii(both, 1).any() and neighbours.radii(both, 2).all()


@pytest.mark.parametrize("score", [precision_recall.score, density_coverage.score])
def test_wrong_features_are_refused(score):
    with pytest.raises(ValueError, match="3 real samples have no neighbour number 3"):
        score(draw(1, 3), draw(2, 10), neighbour=3)
    with pytest.raises(ValueError, match="real features have 3 dimensions, generated ones 4"):
        score(draw(1, 9), draw(2, 9, 4))
    with pytest.raises(ValueError, match="generated features hold NaN"):
        score(draw(1, 9), draw(2, 9) * torch.nan)
    with pytest.raises(ValueError, match="not floating"):
        score(draw(1, 9).long(), draw(2, 9))
