"""The metrics against recorded results of pytorch-fid, torch-fidelity and prdc (tests/metrics/references.py)."""

import pytest
import torch

from functional_sd3.metrics import density_coverage, frechet, inception, inception_score, kid, precision_recall
from tests.metrics import references

KEPT = references.results()
CPUS_AGREE = 1e-6
"""Relative difference up to which two CPUs agree on a number computed from float32 features that are drawn here: the
draws' logarithms and the products of the features round differently under another instruction set (1e-9 to 1e-7)."""


@pytest.fixture(scope="module")
def network():
    return references.random_params()


def relative(ours: torch.Tensor, theirs: list[list[float]]) -> float:
    wanted = torch.tensor(theirs, dtype=torch.float64)
    return float((torch.tensor(references.kept(ours)).double() - wanted).norm() / wanted.norm())


def test_inception_equals_pytorch_fid_at_every_tap(network):
    features = inception.apply(network, references.images() / 255 * 2 - 1)
    for tap, theirs in KEPT["inception"]["pytorch-fid"].items():
        assert relative(features[int(tap)], theirs) < 1e-5, tap


def test_inception_equals_torch_fidelity_at_every_tap_and_in_the_logits(network):
    features = inception.apply(network, (references.images().float() - 128) / 128)
    theirs = KEPT["inception"]["torch-fidelity"]
    for tap in inception.TAPS:
        assert relative(features[tap], theirs[str(tap)]) < 1e-5, tap
    assert relative(features["logits"], theirs["logits"]) < 1e-5
    assert relative(inception.unbiased(network, features["logits"]), theirs["logits_unbiased"]) < 1e-5


@pytest.mark.filterwarnings("ignore::functional_sd3.metrics.frechet.FewSamples")
@pytest.mark.parametrize("name", references.FRECHET)
def test_frechet_distance_equals_the_packages(name):
    n, m, width = references.FRECHET[name]
    x, y = references.features(n, width, 1), references.features(m, width, 2)
    singular = min(n, m) <= width
    ours = frechet.distance(frechet.statistics(x), frechet.statistics(y))
    for package, theirs in KEPT["frechet"][name].items():
        assert ours == pytest.approx(theirs, rel=1e-5 if singular else CPUS_AGREE), package


def test_kernel_distance_equals_torch_fidelity():
    real, generated = references.sets()
    assert float(kid.unbiased(real[:65], generated)) == pytest.approx(KEPT["features"]["kid"], rel=CPUS_AGREE)


def test_precision_and_recall_equal_torch_fidelity():
    actual = precision_recall.score(*references.sets())
    assert actual == pytest.approx((KEPT["features"]["precision"], KEPT["features"]["recall"]), abs=CPUS_AGREE)


def test_density_and_coverage_equal_prdc():
    actual = density_coverage.score(*references.sets())
    assert actual == pytest.approx((KEPT["features"]["density"], KEPT["features"]["coverage"]), abs=CPUS_AGREE)


def test_inception_score_equals_torch_fidelity():
    actual = inception_score.score(references.logits(), splits=5)
    assert actual == pytest.approx((KEPT["isc"]["mean"], KEPT["isc"]["deviation"]), rel=CPUS_AGREE)
