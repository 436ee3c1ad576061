"""Properties of CLIP's preprocessing apart from parity with transformers."""

import pytest
import torch

from functional_sd3.core import prng
from functional_sd3.image import clip_pixels, pixels

CONFIG = clip_pixels.Config(resize=24, crop=20)


def test_a_tensor_is_preprocessed_as_its_png_would_be():
    images = prng.uniform(prng.key(0), (3, 3, 40, 30))
    assert torch.equal(clip_pixels.apply(CONFIG, images), clip_pixels.apply(CONFIG, pixels.to_pil(images)))


def test_images_of_different_sizes_form_a_batch_and_none_an_empty_one():
    images = [pixels.to_pil(torch.rand(1, 3, *size))[0] for size in ((20, 20), (50, 31), (24, 99))]
    assert clip_pixels.apply(CONFIG, images).shape == (3, 3, 20, 20)
    assert clip_pixels.apply(CONFIG, []).shape == (0, 3, 20, 20)


def test_one_colour_becomes_its_normalised_value():
    images = torch.tensor([0.0, 0.2, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 33, 50)
    expected = (torch.tensor([0.0, 0.2, 1.0]) - torch.tensor(CONFIG.mean)) / torch.tensor(CONFIG.std)
    torch.testing.assert_close(clip_pixels.apply(CONFIG, images), expected.reshape(1, 3, 1, 1).expand(1, 3, 20, 20))


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="crop 30 must be between 1 and resize 24"):
        clip_pixels.Config(resize=24, crop=30)
    with pytest.raises(ValueError, match="std"):
        clip_pixels.Config(std=(1.0, 0.0, 1.0))
