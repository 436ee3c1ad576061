"""Gaussian blur against scipy's, at borders that are left out and at borders that are repeated."""

import torch
from scipy import ndimage

from functional_sd3.core import prng
from functional_sd3.image import gaussian

IMAGES = prng.uniform(prng.key(0), (2, 3, 11, 17)).double()


def expected(sigma: float, reach: int) -> torch.Tensor:
    return torch.tensor(ndimage.gaussian_filter(IMAGES.numpy(), (0, 0, sigma, sigma), radius=reach, mode="nearest"))


def test_repeated_borders_keep_the_size():
    result = gaussian.blur(IMAGES, 1.3, 4, border="replicate")
    torch.testing.assert_close(result, expected(1.3, 4), rtol=1e-12, atol=1e-12)


def test_valid_borders_are_the_middle_of_the_repeated():
    result = gaussian.blur(IMAGES, 2.0, 3, border="valid")
    torch.testing.assert_close(result, expected(2.0, 3)[..., 3:-3, 3:-3], rtol=1e-12, atol=1e-12)


def test_a_reach_far_beyond_the_image_takes_little_memory():
    result = gaussian.blur(torch.rand(1, 1, 8, 8), 20_000.0, 60_000, border="replicate")
    assert result.shape == (1, 1, 8, 8) and result.isfinite().all()
