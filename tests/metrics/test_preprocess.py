"""The three ways to 299 x 299, each against its definition written out anew."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functional_sd3.metrics import preprocess

MODES = sorted(preprocess.MODES)


def noise(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def matrix(mode: str, size: int) -> numpy.ndarray:
    """(299, size): what each new row is made of."""
    out, scale = 299, size / 299
    rows = numpy.zeros((out, size))
    for index in range(out):
        if mode == "clean":
            # Keys' cubic (a = -1/2), as wide as the step where that is more than a pixel, cut off at the borders.
            wide = max(scale, 1.0)
            distance = numpy.abs(numpy.arange(size) + 0.5 - (index + 0.5) * scale) / wide
            near = 1.5 * distance**3 - 2.5 * distance**2 + 1
            far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
            rows[index] = numpy.where(distance < 1, near, numpy.where(distance < 2, far, 0))
            rows[index] /= rows[index].sum()
            continue
        place = index * scale if mode == "tf1" else max((index + 0.5) * scale - 0.5, 0)
        low = int(place)
        rows[index, low] += 1 - (place - low)
        rows[index, min(low + 1, size - 1)] += place - low
    return rows


def expected(mode: str, image: torch.Tensor) -> torch.Tensor:
    down, across = (matrix(mode, size) for size in image.shape[1:])
    resized = (down @ image.numpy().astype(float) @ across.T).clip(0, 255)
    return torch.from_numpy(2 * resized / 255 - 1 if mode == "pytorch_fid" else (resized - 128) / 128)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(28, 28), (64, 48), (512, 333), (1, 2), (298, 300)])
def test_each_mode_is_its_definition(mode, size):
    image = noise(*size)
    actual = preprocess.MODES[mode](image)
    assert actual.dtype == torch.float32
    # Places in an image are float32 in the packages too: on noise that is this much.
    torch.testing.assert_close(actual.double(), expected(mode, image), rtol=0, atol=1.5e-4)


@given(st.sampled_from(MODES), st.integers(1, 400), st.integers(1, 400), st.integers(0, 255))
def test_one_colour_stays_one_colour_of_the_mode_s_scale(mode, height, width, value):
    image = torch.full((3, height, width), value, dtype=torch.uint8)
    right = 2 * value / 255 - 1 if mode == "pytorch_fid" else (value - 128) / 128
    torch.testing.assert_close(preprocess.MODES[mode](image), torch.full((3, 299, 299), right), rtol=0, atol=2e-6)


def test_at_299_all_modes_see_the_same_pixels():
    image = noise(299, 299)
    assert torch.equal(preprocess.tf1(image), preprocess.clean(image))
    torch.testing.assert_close(preprocess.tf1(image) * 128 + 128, (preprocess.pytorch_fid(image) + 1) * 127.5)


@pytest.mark.parametrize("mode", MODES)
def test_an_image_is_processed_alone_in_any_batch_and_as_floats_too(mode):
    images = torch.stack([noise(40, 30), noise(40, 30).flip(-1)])
    together = preprocess.MODES[mode](images)
    assert together.shape == (2, 3, 299, 299)
    assert torch.equal(together[1], preprocess.MODES[mode](images[1]))
    assert preprocess.MODES[mode](images[:0]).shape == (0, 3, 299, 299)
    torch.testing.assert_close(preprocess.MODES[mode](images.float() / 255), together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_tensors_that_are_no_image_are_refused(mode):
    for wrong in (torch.zeros(1, 5, 5), torch.zeros(5, 5), torch.zeros(3, 0, 5)):
        with pytest.raises(ValueError, match="must be .*3, height, width"):
            preprocess.MODES[mode](wrong)
    with pytest.raises(ValueError, match="uint8, or floats"):
        preprocess.MODES[mode](torch.zeros(3, 5, 5, dtype=torch.int64))


@pytest.mark.parametrize("mode", ["pytorch_fid", "tf1"])
def test_scores_can_be_differentiated_to_the_pixels(mode):
    image = torch.rand(3, 20, 20, requires_grad=True)
    slope = torch.autograd.grad(preprocess.MODES[mode](image).sum(), image)[0]
    scale = 2.0 if mode == "pytorch_fid" else 255 / 128
    torch.testing.assert_close(slope.sum() / (3 * 299 * 299), torch.tensor(scale), rtol=1e-4, atol=0)
