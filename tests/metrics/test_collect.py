"""Features and statistics of a lazy stream of images: equal in any batches; skipped files are listed."""

from functools import partial

import numpy
import pytest
import torch
from PIL import Image

from functional_sd3.core import prng
from functional_sd3.image import folders
from functional_sd3.image.folders import Item, Skipped
from functional_sd3.metrics import collect, features, frechet, inception, preprocess
from functional_sd3.metrics.features import Features
from functional_sd3.weights import WeightsError
from tests import models

VALUES = prng.normal(prng.key(0), (23, 5))
ITEMS = [Item(f"{index}", value) for index, value in enumerate(VALUES)]
BROKEN = [*ITEMS[:3], Item("x", None, "torn"), *ITEMS[3:], Item("y", None, "wet")]
MATRIX = prng.normal(prng.key(1), (5, 4))


def embed(images: torch.Tensor) -> torch.Tensor:
    return images @ MATRIX


@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_features_and_statistics_do_not_depend_on_the_batches(batch_size):
    actual = collect.features(collect.walk(embed, BROKEN, batch_size=batch_size))
    torch.testing.assert_close(actual.values, VALUES @ MATRIX)
    assert actual.skipped == (Skipped("x", "torn"), Skipped("y", "wet"))
    summed = collect.statistics(collect.walk(embed, BROKEN, batch_size=batch_size))
    expected = frechet.statistics(VALUES @ MATRIX)
    assert summed.values.n == 23 and summed.skipped == actual.skipped
    torch.testing.assert_close(summed.values.mean, expected.mean)
    torch.testing.assert_close(summed.values.m2, expected.m2)


def test_images_are_read_one_batch_ahead_at_most():
    read = []

    def items():
        for item in ITEMS:
            read.append(item.name)
            yield item

    batches = collect.walk(embed, items(), batch_size=4)
    assert not read
    next(batches)
    assert len(read) == 4


def test_a_set_without_a_readable_image_is_refused_by_name():
    for gather in (collect.features, collect.statistics):
        with pytest.raises(ValueError, match="none of 2 images could be read; the first, x: torn"):
            gather(collect.walk(embed, [Item("x", None, "torn"), Item("y", None, "wet")]))
        with pytest.raises(ValueError, match="there are no images"):
            gather(collect.walk(embed, []))
    with pytest.raises(ValueError, match="batch_size 0"):
        next(collect.walk(embed, ITEMS, batch_size=0))


def test_features_on_disk_say_how_they_were_made(tmp_path):
    path = tmp_path / "features.npz"
    actual = Features(VALUES, "tf1", "ab" * 32, 192)
    features.save(path, actual)
    again = features.load(path)
    assert torch.equal(again.values, VALUES) and again[1:] == actual[1:]
    numpy.savez(tmp_path / "bare.npz", features=VALUES.numpy())
    numpy.savez(tmp_path / "statistics.npz", mu=numpy.zeros(3), sigma=numpy.eye(3))
    numpy.savez(tmp_path / "whole.npz", features=numpy.arange(3), preprocessing="clean", weights="x", tap="64")
    (tmp_path / "text.npz").write_text("text")
    for name, words in {
        "bare.npz": "preprocessing is None, not str",
        "statistics.npz": r"holds statistics \(mu and sigma\), from which features cannot be had back",
        "whole.npz": "tap is '64', not int",
        "text.npz": "is not an .npz file of features",
        "absent.npz": "cannot be opened",
    }.items():
        with pytest.raises(WeightsError, match=words):
            features.load(tmp_path / name)


def test_a_folder_becomes_the_features_of_its_images(tmp_path):
    generator = numpy.random.default_rng(0)
    arrays = [generator.integers(0, 256, (20 + index, 31, 3), dtype=numpy.uint8) for index in range(3)]
    for index, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{index}.png")
    params = models.random_inception()
    items = folders.stream(folders.source(tmp_path), partial(preprocess.image, mode="pytorch_fid"))
    actual = collect.features(
        collect.walk(lambda images: inception.apply(params, images, last=64)[64], items, batch_size=2)
    )
    images = [preprocess.pytorch_fid(torch.from_numpy(array).permute(2, 0, 1)) for array in arrays]
    with torch.no_grad():
        expected = inception.apply(params, torch.stack(images), last=192)
    assert sorted(expected) == [64, 192]
    torch.testing.assert_close(actual.values, expected[64], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="last 65 must be one of"):
        inception.apply(params, torch.stack(images), last=65)
