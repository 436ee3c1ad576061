"""PSNR and SSIM against closed forms and against the definition of scikit-image, written out."""

import math

import numpy
import pytest
import torch
from scipy import ndimage

from functional_sd3.core import prng
from functional_sd3.metrics import similarity

IMAGES = prng.uniform(prng.key(0), (2, 3, 33, 40)).double()
NOISY = (IMAGES + 0.1 * prng.normal(prng.key(1), IMAGES.shape)).clamp(0, 1)


def test_psnr_of_a_constant_difference_is_its_decibels():
    reference = torch.rand(3, 3, 8, 8)
    offsets = torch.tensor([0.1, 0.01, 1.0])
    actual = similarity.psnr(reference + offsets[:, None, None, None], reference)
    torch.testing.assert_close(actual, torch.tensor([20.0, 40.0, 0.0]).double(), rtol=0, atol=1e-3)
    assert similarity.psnr(reference, reference).tolist() == [math.inf] * 3
    assert similarity.psnr(255 * IMAGES, 255 * NOISY, peak=255).allclose(similarity.psnr(IMAGES, NOISY))


def by_definition(x: numpy.ndarray, y: numpy.ndarray, peak: float) -> float:
    def blur(z):
        return ndimage.gaussian_filter(z, 1.5, truncate=3.5)

    mean_x, mean_y = blur(x), blur(y)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * (blur(x * y) - mean_x * mean_y) + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2 + c2)
    return (above / below)[5:-5, 5:-5].mean()


@pytest.mark.parametrize("peak", [1.0, 255.0])
def test_ssim_is_the_mean_over_windows_inside_and_channels(peak):
    x, y = peak * IMAGES, peak * NOISY
    expected = [numpy.mean([by_definition(a, b, peak) for a, b in zip(*each, strict=True)])
                for each in zip(x.numpy(), y.numpy(), strict=True)]  # fmt: skip
    torch.testing.assert_close(similarity.ssim(x, y, peak=peak), torch.tensor(expected), rtol=1e-9, atol=0)


def test_ssim_equals_scikit_image():
    # structural_similarity of scikit-image 0.26 (gaussian_weights=True, use_sample_covariance=False, data_range=1).
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(20.0), indexing="ij")
    x = (0.5 + 0.5 * torch.sin(rows / 3 + columns / 5))[None, None].double()
    y = 0.5 + 0.4 * torch.sin(rows / 3 + columns / 5 + 0.3) + 0.05 * torch.cos(7 * rows * columns)
    # The inputs are float32 sines, which round differently on another CPU.
    assert float(similarity.ssim(x, y[None, None].double())) == pytest.approx(0.8034196248826075, rel=1e-6)


def test_ssim_of_one_colour_is_its_luminance_term_and_of_equal_images_1():
    a, b = 0.3, 0.7
    actual = similarity.ssim(torch.full((1, 3, 11, 15), a), torch.full((1, 3, 11, 15), b))
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    torch.testing.assert_close(actual, torch.tensor([expected]).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(similarity.ssim(IMAGES, IMAGES), torch.ones(2).double(), rtol=0, atol=1e-12)
    assert similarity.ssim(IMAGES, 1 - IMAGES).max() < 0
    assert torch.equal(similarity.ssim(IMAGES, NOISY), similarity.ssim(NOISY, IMAGES))


def test_images_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        similarity.psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="smaller than SSIM's window of 11"):
        similarity.ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))
    with pytest.raises(ValueError, match="both must be floats"):
        similarity.psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
