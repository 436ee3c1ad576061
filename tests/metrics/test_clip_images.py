"""CLIP score and CMMD from images to the figure, with small random encoders."""

import math

import pytest
import torch
from PIL import Image

from functional_sd3.core import prng
from functional_sd3.image import clip_pixels, pixels
from functional_sd3.metrics import clip_images
from functional_sd3.text import bpe, clip
from functional_sd3.text.clip import dual as clip_dual
from tests import models

TOKENIZER = models.tokenizers().clip_l
CONFIG = clip_dual.Config(
    clip.Config(len(TOKENIZER.vocab), 24, 32, 2, 2, 48, projection_width=16, eos_id=TOKENIZER.eos_id),
    clip.ImageConfig(16, 8, 32, 2, 2, 48, projection_width=16),
)
PARAMS = clip_dual.init(prng.key(0), CONFIG)
PIXELS = clip_pixels.Config(16, 16)
IMAGES = prng.uniform(prng.key(1), (3, 3, 20, 30))
CAPTIONS = ["a small red circle", "a large blue star on a white background", "x"]


def test_clip_score_is_a_hundred_times_the_cosine_or_0():
    actual = clip_images.scores(PARAMS, CONFIG, TOKENIZER, PIXELS, IMAGES, CAPTIONS)
    ids = bpe.apply(TOKENIZER, CAPTIONS, length=24)
    logits = clip_dual.apply(PARAMS, CONFIG, ids, clip_pixels.apply(PIXELS, IMAGES))
    cosines = logits.diagonal() / PARAMS["logit_scale"].exp()
    torch.testing.assert_close(actual, 100 * cosines.clamp(min=0).double(), rtol=1e-4, atol=1e-4)
    assert actual.max() > 0
    as_images = clip_images.scores(PARAMS, CONFIG, TOKENIZER, PIXELS, pixels.to_pil(IMAGES), CAPTIONS)
    assert torch.equal(actual, as_images)
    with pytest.raises(ValueError, match="3 images and 2 captions"):
        clip_images.scores(PARAMS, CONFIG, TOKENIZER, PIXELS, IMAGES, CAPTIONS[:2])


def test_the_differentiable_score_is_the_score_but_for_rounding():
    plain = clip_images.scores(PARAMS, CONFIG, TOKENIZER, PIXELS, IMAGES, CAPTIONS).float()
    images = IMAGES.clone().requires_grad_()
    actual = clip_images.differentiable_scores(PARAMS, CONFIG, TOKENIZER, PIXELS, images, CAPTIONS)
    torch.testing.assert_close(actual.detach().clamp(min=0), plain, rtol=0, atol=0.5)
    (gradient,) = torch.autograd.grad(actual.sum(), images)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    distance = (clip_pixels.resample(PIXELS, IMAGES) - clip_pixels.apply(PIXELS, IMAGES)).abs()
    # Pillow rounds and clamps between its two passes, which shows most in white noise.
    assert distance.max() < 8 / 255 / 0.26 and distance.mean() < 1 / 255 / 0.26
    with pytest.raises(ValueError, match="3 images and 2 captions"):
        clip_images.differentiable_scores(PARAMS, CONFIG, TOKENIZER, PIXELS, IMAGES, CAPTIONS[:2])


def test_cmmd_is_the_kernel_s_mean_over_all_pairs_and_0_for_equal_sets():
    others = prng.uniform(prng.key(2), (2, 3, 20, 30)) ** 3
    actual = clip_images.cmmd_distance(PARAMS, CONFIG, PIXELS, IMAGES, others)
    x, y = (
        clip_dual.image_embeddings(PARAMS, CONFIG, clip_pixels.apply(PIXELS, images, square=True)).detach().double()
        for images in (IMAGES, others)
    )

    def mean(a, b):
        return sum(math.exp(-float((u - v).square().sum()) / 200) for u in a for v in b) / (len(a) * len(b))

    assert actual == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-6) and actual > 0
    assert clip_images.cmmd_distance(PARAMS, CONFIG, PIXELS, IMAGES, IMAGES) == pytest.approx(0, abs=1e-9)


def test_cmmd_cuts_out_the_middle_before_it_resizes():
    img = pixels.to_pil(prng.uniform(prng.key(3), (1, 3, 33, 50)))[0]
    cut = img.crop((8, 0, 41, 33)).resize((16, 16), Image.Resampling.BICUBIC)
    expected = (pixels.from_pil(cut)[0] - torch.tensor(PIXELS.mean)[:, None, None]) / torch.tensor(PIXELS.std)[
        :, None, None
    ]
    torch.testing.assert_close(clip_pixels.apply(PIXELS, img, square=True)[0], expected, rtol=1e-5, atol=1e-6)
