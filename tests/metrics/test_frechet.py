"""Frechet statistics and distance: closed forms, and properties for any features and order of merging."""

import math
import os

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functional_sd3.core import prng
from functional_sd3.metrics import fid, frechet
from tests.metrics import references

few = pytest.mark.filterwarnings("ignore::functional_sd3.metrics.frechet.FewSamples")
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(2, 40)
widths = st.integers(1, 9)


def draw(seed: int, n: int, width: int, dtype=torch.float64) -> torch.Tensor:
    """Correlated features far from the origin, where sums of squares would cancel."""
    first, second = prng.split(prng.key(seed))
    return 50 + prng.normal(first, (n, width), dtype) @ prng.normal(second, (width, width), dtype)


def close(a: frechet.Statistics, b: frechet.Statistics) -> None:
    assert a.n == b.n
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.m2, b.m2, rtol=1e-9, atol=1e-9)


@given(seeds, st.integers(2, 200), widths, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_statistics_are_numpys_mean_and_covariance(seed, n, width, dtype):
    features = draw(seed, n, width).to(dtype)
    actual = frechet.statistics(features)
    values = features.double().numpy()
    numpy.testing.assert_allclose(actual.mean.numpy(), values.mean(0), rtol=1e-12)
    wanted = numpy.cov(values, rowvar=False).reshape(width, width)
    numpy.testing.assert_allclose(frechet.covariance(actual).numpy(), wanted, rtol=1e-9, atol=1e-9)
    assert actual.n == n and actual.mean.dtype == actual.m2.dtype == torch.float64


def test_statistics_of_more_rows_than_a_block_are_numpys_too():
    features = draw(3, 9001, 3)
    wanted = numpy.cov(features.numpy(), rowvar=False)
    numpy.testing.assert_allclose(frechet.covariance(frechet.statistics(features)).numpy(), wanted, rtol=1e-11)


@given(seeds, st.lists(st.integers(0, 12), min_size=1, max_size=6), widths, st.randoms(use_true_random=False))
def test_any_split_in_any_order_gives_the_statistics_of_the_whole(seed, parts, width, random):
    features = draw(seed, sum(parts), width)
    pieces = [frechet.statistics(part) for part in features.split(parts)]
    while len(pieces) > 1:
        random.shuffle(pieces)
        pieces = [frechet.merge(pieces[0], pieces[1]), *pieces[2:]]
    close(pieces[0], frechet.statistics(features[torch.tensor(random.sample(range(sum(parts)), sum(parts))).long()]))


@given(seeds, st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), widths)
def test_merging_is_commutative_and_associative_and_nothing_is_its_identity(seed, n, m, o, width):
    a, b, c = (frechet.statistics(draw(seed ^ index, size, width)) for index, size in enumerate((n, m, o)))
    close(frechet.merge(a, b), frechet.merge(b, a))
    close(frechet.merge(frechet.merge(a, b), c), frechet.merge(a, frechet.merge(b, c)))
    close(frechet.merge(a, frechet.statistics(torch.empty(0, width))), a)


def test_merging_writes_into_neither():
    a, b = frechet.statistics(draw(0, 5, 3)), frechet.statistics(draw(1, 6, 3))
    before = [part.clone() for part in (a.mean, a.m2, b.mean, b.m2)]
    frechet.merge(a, b)
    for part, kept in zip((a.mean, a.m2, b.mean, b.m2), before, strict=True):
        assert torch.equal(part, kept)


@few
@given(seeds, sizes, sizes, widths)
def test_the_distance_is_symmetric_not_negative_and_zero_on_itself(seed, n, m, width):
    x, y = draw(seed, n, width), draw(seed ^ 1, m, width)
    a, b = frechet.statistics(x), frechet.statistics(y)
    scale = float(a.m2.trace() / n + b.m2.trace() / m + (a.mean - b.mean).square().sum())
    assert frechet.distance(a, b) == pytest.approx(frechet.distance(b, a), rel=1e-6, abs=1e-9 * scale)
    assert frechet.distance(a, b) >= 0
    assert 0 <= frechet.distance(a, frechet.statistics(x.flip(0))) <= 1e-7 * scale


@few
@given(seeds, sizes, sizes, widths)
def test_a_common_rotation_and_shift_change_nothing(seed, n, m, width):
    x, y = draw(seed, n, width), draw(seed ^ 1, m, width)
    rotation, _ = torch.linalg.qr(prng.normal(prng.key(seed ^ 2), (width, width), torch.float64))
    plain = frechet.distance(frechet.statistics(x), frechet.statistics(y))
    turned = frechet.distance(frechet.statistics(x @ rotation - 7), frechet.statistics(y @ rotation - 7))
    scale = float((x - x.mean(0)).square().sum() / n + (y - y.mean(0)).square().sum() / m)
    assert turned == pytest.approx(plain, rel=1e-6, abs=1e-6 * scale)


def made(mean: torch.Tensor, covariance: torch.Tensor, n: int = 1001) -> frechet.Statistics:
    return frechet.Statistics(n, mean.double(), covariance.double() * (n - 1))


def test_diagonal_covariances_have_the_closed_form():
    mean, other = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    spread, wide = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.5, 3.0, 4.0])
    actual = frechet.distance(made(mean, spread.square().diag()), made(other, wide.square().diag()))
    assert actual == pytest.approx(float((mean - other).square().sum() + (spread - wide).square().sum()), rel=1e-12)


def test_degenerate_covariances_have_their_closed_forms():
    nothing, middle = torch.zeros(16, 16), torch.zeros(16)
    assert frechet.distance(made(middle, nothing), made(middle, nothing)) == 0
    assert frechet.distance(made(middle, nothing), made(middle, torch.eye(16))) == pytest.approx(16, rel=1e-12)
    first, second = torch.zeros(16, 16), torch.zeros(16, 16)
    first[0, 0] = second[1, 1] = 1
    assert frechet.distance(made(middle, first), made(middle, second)) == pytest.approx(2, rel=1e-12)


def test_one_dimension_has_the_closed_form():
    a, b = made(torch.tensor([1.0]), torch.tensor([[4.0]])), made(torch.tensor([3.0]), torch.tensor([[9.0]]))
    assert frechet.distance(a, b) == pytest.approx(4 + 1, rel=1e-12)


def test_covariances_that_do_not_commute_have_the_root_of_two_by_two_matrices():
    a, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double(), torch.tensor([[1.0, -0.5], [-0.5, 2.0]]).double()
    # tr sqrt(M)^2 = tr M + 2 sqrt(det M) for two by two matrices.
    wanted = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float((a @ b).det())))
    assert float(frechet.root_trace(a, b)) == pytest.approx(wanted, rel=1e-12)


@few
@pytest.mark.parametrize("n, m", [(40, 50), (40, 300), (300, 40), (2, 9)])
def test_singular_covariances_lose_no_digits(n, m):
    # The rounding errors of eigenvalues that are 0 cost half of the digits, in the packages too.
    x, y = references.features(n, 64, 1).double(), references.features(m, 64, 2).double()
    left, right = ((part - part.mean(0)) / (len(part) - 1) ** 0.5 for part in (x, y))
    apart = (x.mean(0) - y.mean(0)).square().sum() + left.square().sum() + right.square().sum()
    wanted = float(apart - 2 * torch.linalg.svdvals(left @ right.T).sum())
    assert frechet.distance(frechet.statistics(x), frechet.statistics(y)) == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize("dead", [slice(0, 5), slice(40, 48), slice(3, None, 7)])
def test_features_that_never_fire_change_nothing(dead):
    x, y = references.features(200, 48, 1), references.features(200, 48, 2)
    alive = torch.ones(48, dtype=torch.bool).index_fill(0, torch.arange(48)[dead], False)
    wanted = frechet.distance(frechet.statistics(x[:, alive]), frechet.statistics(y[:, alive]))
    actual = frechet.distance(frechet.statistics(x * alive), frechet.statistics(y * alive))
    # Here N does not tell the rank: the roots of rounding errors remain, 1e-8 of the distance.
    assert actual == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("decay", [0.1, 1.0])
def test_identical_sets_are_at_distance_zero_whatever_their_spectrum_and_their_batches(decay):
    width = 96
    scales = 30 * torch.exp(-decay * torch.arange(width).double())
    features = (prng.normal(prng.key(5), (3 * width, width)).double() * scales).float()
    # Features that never fire are common; they make the covariance singular however many samples there are.
    features[:, ::7] = 0
    whole = frechet.statistics(features)
    shuffled = features[prng.permutation(prng.key(6), len(features))]
    parts = [frechet.statistics(part) for part in shuffled.split(17)]
    merged = parts[0]
    for part in parts[1:]:
        merged = frechet.merge(merged, part)
    assert frechet.distance(whole, merged) < 1e-6


def test_the_trace_can_be_differentiated():
    a, b = (frechet.covariance(frechet.statistics(draw(seed, 30, 4))) for seed in (1, 2))
    slope = torch.func.grad(lambda scale: frechet.root_trace(a * scale, b))(torch.tensor(1.0, dtype=torch.float64))
    # It grows as the square root of either matrix.
    assert float(slope) == pytest.approx(0.5 * float(frechet.root_trace(a, b)), rel=1e-9)
    assert torch.autograd.gradcheck(lambda x: frechet.root_trace(x @ x.T, b), torch.linalg.cholesky(a).requires_grad_())


def test_few_samples_are_warned_of_with_their_number():
    a = frechet.statistics(draw(0, 15, 8))
    with pytest.warns(frechet.FewSamples, match="N = 15 and 15 samples are few for 8 dimensions"):
        frechet.distance(a, a)
    enough = frechet.statistics(draw(0, 16, 8))
    frechet.distance(enough, enough)


@few
def test_statistics_that_cannot_be_compared_are_refused_by_name():
    a = frechet.statistics(draw(0, 20, 3))
    with pytest.raises(ValueError, match="3 and of 4 dimensions"):
        frechet.distance(a, frechet.statistics(draw(0, 20, 4)))
    with pytest.raises(ValueError, match="1 samples have no covariance"):
        frechet.distance(a, frechet.statistics(draw(0, 1, 3)))
    broken = draw(0, 20, 30).index_fill(0, torch.tensor([4]), math.nan)
    with pytest.raises(ValueError, match="NaN"):
        frechet.distance(frechet.statistics(broken), frechet.statistics(broken))
    with pytest.raises(ValueError, match=r"torch.int64 \[3, 4\]"):
        frechet.statistics(torch.zeros(3, 4, dtype=torch.int64))


def save_part(folder, parts):
    """The statistics of every `parts`-th row, in a file of this process."""
    rank = int(os.environ["RANK"])
    features = references.features(101, 12, 1)[rank::parts]
    fid.save(folder / f"{rank}.npz", fid.Record(frechet.statistics(features), "clean", "any"))


def test_processes_add_up_to_one(processes, tmp_path):
    processes(4, save_part, tmp_path, 4)
    records = [fid.load(tmp_path / f"{part}.npz") for part in range(4)]
    merged = fid.merge(fid.merge(records[2], records[0]), fid.merge(records[3], records[1]))
    whole = fid.Record(frechet.statistics(references.features(101, 12, 1)), "clean", "any")
    close(merged.statistics, whole.statistics)
    assert fid.score(merged, whole).value < 1e-9
