"""Records of statistics: different provenance is not compared, and every score names its numbers of images."""

import pytest

from functional_sd3.metrics import fid, frechet
from tests.metrics import references


def record(seed: int, n: int = 40, **labels) -> fid.Record:
    made = {"preprocessing": "clean", "weights": "a"} | labels
    return fid.Record(frechet.statistics(references.features(n, 8, seed)), **made)


def test_a_score_names_its_numbers_of_images():
    score = fid.score(record(1), record(2, 30))
    assert score.value == frechet.distance(record(1).statistics, record(2, 30).statistics)
    assert str(score) == f"FID {score.value:.4f} (N = 40 and 30)"


def test_a_score_at_another_tap_is_not_called_fid():
    assert str(fid.score(record(1, tap=64), record(2, tap=64))).startswith("Frechet distance at tap 64 ")


def test_records_add_up():
    merged = fid.merge(record(1), record(2))
    assert merged.statistics.n == 80 and merged[1:] == record(1)[1:]


@pytest.mark.parametrize(
    "labels, said",
    [
        ({"preprocessing": "tf1"}, "preprocessing 'clean' and 'tf1'"),
        ({"weights": "b"}, "weights 'a' and 'b'"),
        ({"tap": 768}, "tap 2048 and 768"),
    ],
)
@pytest.mark.parametrize("together", [fid.score, fid.merge])
def test_statistics_of_different_provenance_are_refused_by_name(labels, said, together):
    with pytest.raises(ValueError, match=said):
        together(record(1), record(2, **labels))


def test_too_few_images_give_a_warning():
    with pytest.warns(frechet.FewSamples, match="N = 15 and 40"):
        fid.score(record(1, 15), record(2))
