"""The whole pipeline against diffusers' StableDiffusion3Pipeline, from a folder this project wrote."""

import warnings

import pytest
import torch

from functional_sd3 import pipeline, weights
from functional_sd3.core import prng
from functional_sd3.flow import ode
from tests import models
from tests.models import parts

PROMPTS = ["a large red circle on a white background", "a small blue star left of a green ring on black"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our model, and diffusers' pipeline loaded from what we saved of it."""
    from diffusers import StableDiffusion3Pipeline

    folder = tmp_path_factory.mktemp("model") / "random"
    model = models.random_model()
    weights.save(folder, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = StableDiffusion3Pipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return weights.load(folder), theirs


def run_theirs(theirs, noise, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return theirs(
            PROMPTS,
            latents=noise,
            height=noise.shape[-2] * 8,
            width=noise.shape[-1] * 8,
            max_sequence_length=24,
            output_type="pt",
            **options,
        ).images


@pytest.mark.parametrize(
    ("options", "theirs_options", "size"),
    [
        ({"steps": 8, "cfg": 5.0}, {"num_inference_steps": 8, "guidance_scale": 5.0}, (8, 8)),
        ({"steps": 5, "cfg": 1.0}, {"num_inference_steps": 5, "guidance_scale": 1.0}, (8, 8)),
        (
            {"steps": 8, "cfg": 4.0, "negative": "a red square"},
            {"num_inference_steps": 8, "guidance_scale": 4.0, "negative_prompt": ["a red square"] * 2},
            (12, 6),
        ),
    ],
    ids=["cfg 5", "no guidance", "negative prompt, not square"],
)
def test_pixels_equal_diffusers(pair, options, theirs_options, size):
    model, theirs = pair
    noise = prng.normal(prng.key(7), (2, 16, *size))
    with torch.no_grad():
        images = pipeline.generate(*parts(model), PROMPTS, prng.key(0), noise=noise, **options, height=None)
    expected = run_theirs(theirs, noise, **theirs_options)
    assert images.std() > 0.05
    assert float((images - expected).abs().max()) < 1e-4


def test_heun_equals_diffusers_heun(pair):
    from diffusers import FlowMatchHeunDiscreteScheduler

    model, theirs = pair
    noise = prng.normal(prng.key(8), (2, 16, 8, 8))
    kept = theirs.scheduler
    theirs.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    try:
        expected = run_theirs(theirs, noise, num_inference_steps=6, guidance_scale=5.0)
    finally:
        theirs.scheduler = kept
    with torch.no_grad():
        images = pipeline.generate(
            *parts(model), PROMPTS, prng.key(0), noise=noise, steps=6, method=ode.METHODS["heun_edm"]
        )
    assert float((images - expected).abs().max()) < 1e-4
