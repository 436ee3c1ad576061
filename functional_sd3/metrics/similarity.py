"""PSNR and SSIM of images against references.

Both work on RGB without gamma, luma or cropping, and on floats without rounding: round with `pixels.to_bytes` first to
measure the images that a PNG would hold.
"""

import torch
from torch import Tensor

from functional_sd3.image import gaussian

WINDOW = 11
SIGMA = 1.5
K1, K2 = 0.01, 0.03


def psnr(images: Tensor, references: Tensor, *, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in decibels, 10 log10(peak^2 / mean squared error), of each image: (batch,).

    images and references (batch, channels, height, width), float; the mean is over all pixels and channels of an
    image. Infinite for equal images. `peak`: the range of the values, 1 for images in [0, 1].
    """
    _check(images, references)
    error = (images.double() - references.double()).square().flatten(1).mean(1)
    return 10.0 * torch.log10(peak**2 / error)


def ssim(images: Tensor, references: Tensor, *, peak: float = 1.0) -> Tensor:
    """Mean structural similarity of each image, at most 1: (batch,), float64.

    Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity", equations 13 to 17:
    Gaussian window of 11 x 11 pixels with standard deviation 1.5, weights normalised, K1 = 0.01, K2 = 0.03; averaged
    over the windows that lie inside the image, and over the channels; without the downsampling of the authors' script.
    It is scikit-image's `structural_similarity(gaussian_weights=True, use_sample_covariance=False)`.

    images and references (batch, channels, height, width), float, `peak` as in `psnr`. Raises ValueError below 11
    pixels a side.
    """
    _check(images, references)
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(f"images of {images.shape[-1]}x{images.shape[-2]} are smaller than SSIM's window of {WINDOW}")
    x, y = images.double(), references.double()
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast_and_structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * contrast_and_structure).flatten(1).mean(1)


def _blur(x: Tensor) -> Tensor:
    """The weighted mean over every window that lies inside the image."""
    return gaussian.blur(x, SIGMA, WINDOW // 2, border="valid")


def _check(images: Tensor, references: Tensor) -> None:
    if images.ndim != 4 or images.shape != references.shape:
        shapes = f"{list(images.shape)} and {list(references.shape)}"
        raise ValueError(f"images and references must be (batch, channels, height, width) of one shape, not {shapes}")
    if not (images.is_floating_point() and references.is_floating_point()):
        raise ValueError(f"images are {images.dtype} and references {references.dtype}; both must be floats")
