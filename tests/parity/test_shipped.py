"""The shipped model: its path and size; diffusers loads it and draws the same image from the same noise."""

import warnings

import pytest
import torch

from functional_sd3 import pipeline, weights
from functional_sd3.core import prng
from functional_sd3.recipes.shapes import prompts, report
from functional_sd3.weights import shipped

PROMPTS = [
    "a large red circle on a white background",
    "a small blue star left of a large green square on a black background",
]


@pytest.fixture(scope="module")
def model():
    return weights.load(shipped.folder(), dtype=torch.float32)


def test_the_folder_is_at_most_25_megabytes():
    assert sum(file.stat().st_size for file in shipped.folder().rglob("*") if file.is_file()) <= 25e6


def test_diffusers_draws_the_same_image(model):
    from diffusers import StableDiffusion3Pipeline

    noise = prng.normal(prng.key(3), (2, 16, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = StableDiffusion3Pipeline.from_pretrained(shipped.folder(), torch_dtype=torch.float32)
        theirs.set_progress_bar_config(disable=True)
        length = model.tokenizers.t5.model_max_length
        expected = theirs(
            PROMPTS, latents=noise, guidance_scale=5.0, max_sequence_length=length, output_type="pt"
        ).images
    with torch.no_grad():
        images = pipeline.generate(
            model.params, model.config, model.tokenizers, PROMPTS, prng.key(0), noise=noise, cfg=5.0
        )
    assert images.shape == (2, 3, 64, 64)
    assert float((images - expected).abs().max()) <= 2 / 255


def test_backgrounds_are_drawn_as_prompted(model):
    with torch.no_grad():
        images = pipeline.generate(model.params, model.config, model.tokenizers, PROMPTS, prng.key(0))
    assert [prompts.read(image).background for image in images] == ["white", "black"]


@pytest.mark.parametrize("reader", ["prompts", "outlines"])
def test_decoded_originals_are_read_as_drawn(decoded, reader):
    images, scenes = decoded
    shares = prompts.table(images, scenes, reader=report.READERS[reader])
    assert shares["right"] >= 0.98, shares


@pytest.fixture(scope="module")
def decoded(model):
    """A hundred scenes, encoded and decoded by the shipped autoencoder."""
    return report.decoded_originals(model, 100, prng.key(7))
