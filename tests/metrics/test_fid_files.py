"""Statistics on disk: they come back with their making, pytorch-fid reads them, and nothing half-loads."""

import numpy
import pytest
import torch

from functional_sd3.metrics import fid, frechet
from functional_sd3.weights import WeightsError
from tests.metrics import references


@pytest.fixture
def record():
    return fid.Record(frechet.statistics(references.features(20, 7, 1)), "clean", "abc", 192)


def test_a_record_comes_back(tmp_path, record):
    path = tmp_path / "real.stats"
    fid.save(path, record)
    loaded = fid.load(path)
    assert loaded[1:] == record[1:] and loaded.statistics.n == 20
    torch.testing.assert_close(loaded.statistics.mean, record.statistics.mean, rtol=0, atol=0)
    torch.testing.assert_close(loaded.statistics.m2, record.statistics.m2, rtol=1e-15, atol=1e-15)
    assert [entry.name for entry in tmp_path.iterdir()] == ["real.stats"]


@pytest.mark.parametrize("n", [0, 1])
def test_records_of_none_and_of_one_come_back(tmp_path, n):
    record = fid.Record(frechet.statistics(references.features(1, 7, 1)[:n]), "clean", "abc")
    fid.save(tmp_path / "x.npz", record)
    loaded = fid.load(tmp_path / "x.npz").statistics
    assert loaded.n == n and torch.equal(loaded.mean, record.statistics.mean) and not loaded.m2.any()


def test_pytorch_fid_finds_its_entries(tmp_path, record):
    fid.save(tmp_path / "x.npz", record)
    with numpy.load(tmp_path / "x.npz", allow_pickle=False) as file:
        values = references.features(20, 7, 1).double().numpy()
        numpy.testing.assert_allclose(file["mu"], values.mean(0), rtol=1e-12)
        numpy.testing.assert_allclose(file["sigma"], numpy.cov(values, rowvar=False), rtol=1e-9, atol=1e-12)


def test_files_of_pytorch_fid_need_their_provenance_as_arguments(tmp_path, record):
    values = references.features(20, 7, 1).double().numpy()
    numpy.savez(tmp_path / "x.npz", mu=values.mean(0), sigma=numpy.cov(values, rowvar=False))
    with pytest.raises(WeightsError, match="does not say n;") as caught:
        fid.load(tmp_path / "x.npz", weights="abc")
    assert len(caught.value.problems) == 3
    loaded = fid.load(tmp_path / "x.npz", n=20, preprocessing="clean", weights="abc", tap=192)
    torch.testing.assert_close(loaded.statistics.m2, record.statistics.m2, rtol=1e-9, atol=1e-9)
    assert fid.score(loaded, record).value < 1e-9


def test_a_file_of_another_provenance_is_refused(tmp_path, record):
    fid.save(tmp_path / "x.npz", record)
    with pytest.raises(WeightsError, match="says preprocessing 'clean', not 'tf1'"):
        fid.load(tmp_path / "x.npz", preprocessing="tf1")


@pytest.mark.parametrize(
    "entries, said",
    [
        ({"mu": numpy.zeros(3)}, "sigma is missing"),
        ({"mu": numpy.zeros(3), "sigma": numpy.zeros((3, 4))}, r"mu \[3\] and sigma \[3, 4\]"),
        ({"mu": numpy.zeros(3, int), "sigma": numpy.zeros((3, 3))}, "mu is int64"),
        ({"mu": numpy.zeros(3), "sigma": numpy.zeros((3, 3)), "n": "many"}, "n is 'many', not int"),
        ({"mu": numpy.zeros(3), "sigma": numpy.zeros((3, 3)), "n": -2}, "n is -2"),
        ({"mu": numpy.array([{}]), "sigma": numpy.zeros((3, 3))}, "mu holds Python objects"),
    ],
)
def test_wrong_files_are_refused(tmp_path, entries, said):
    numpy.savez(tmp_path / "x.npz", **{"n": 5, "preprocessing": "clean", "weights": "abc", "tap": 192} | entries)
    with pytest.raises(WeightsError, match=said):
        fid.load(tmp_path / "x.npz")


def test_broken_and_missing_files_are_refused(tmp_path, record):
    path = tmp_path / "x.npz"
    with pytest.raises(WeightsError, match="cannot be opened: no such file"):
        fid.load(path)
    fid.save(path, record)
    whole = path.read_bytes()
    for content in (b"", b"not a zip", whole[: len(whole) // 2], whole[:200] + b"\x07" * 40 + whole[240:]):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="x.npz: "):
            fid.load(path)
    numpy.save(tmp_path / "y.npy", numpy.zeros(3))
    with pytest.raises(WeightsError, match="y.npy: "):
        fid.load(tmp_path / "y.npy")
    with pytest.raises(WeightsError, match="is a folder, not a file"):
        fid.load(tmp_path)
