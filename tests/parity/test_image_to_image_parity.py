"""Image to image and inpainting against diffusers' Img2Img and Inpaint pipelines of Stable Diffusion 3."""

import warnings

import pytest
import torch

from functional_sd3 import pipeline, weights
from functional_sd3.core import prng
from functional_sd3.flow import schedule
from functional_sd3.image import vae
from tests import models
from tests.models import parts

PROMPTS = ["a large red circle on a white background", "a small blue star left of a green ring on black"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "random"
    weights.save(folder, models.random_model())
    return weights.load(folder), folder


@pytest.fixture
def run_theirs(made, monkeypatch):
    """A pipeline of diffusers, told the noise and the mean of the posterior, which it would draw."""
    import diffusers
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    def run(name, noise, images, **options):
        module = f"diffusers.pipelines.stable_diffusion_3.{diffusers_module(name)}.randn_tensor"
        monkeypatch.setattr(module, lambda *arguments, **told: noise)
        monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = getattr(diffusers, name).from_pretrained(made[1])
            theirs.set_progress_bar_config(disable=True)
            return theirs(
                PROMPTS, image=images, max_sequence_length=24, output_type=options.pop("output", "pt"), **options
            ).images

    return run


def diffusers_module(name: str) -> str:
    return "pipeline_stable_diffusion_3_" + ("img2img" if "Img2Img" in name else "inpaint")


@pytest.mark.parametrize(
    ("strength", "steps", "cfg", "size"),
    [(0.6, 8, 5.0, (8, 8)), (0.2, 20, 1.0, (8, 8)), (1.0, 4, 4.0, (6, 12)), (0.33, 7, 4.0, (8, 8))],
)
def test_pixels_from_images_equal_diffusers(made, run_theirs, strength, steps, cfg, size):
    model, _ = made
    noise = prng.normal(prng.key(1), (2, 16, *size))
    images = prng.uniform(prng.key(2), (2, 3, 8 * size[0], 8 * size[1]))
    expected = run_theirs(
        "StableDiffusion3Img2ImgPipeline",
        noise,
        images,
        height=images.shape[-2],
        width=images.shape[-1],
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=cfg,
    )
    with torch.no_grad():
        ours = pipeline.image_to_image(
            *parts(model), PROMPTS, images, prng.key(0), noise=noise, strength=strength, steps=steps, cfg=cfg
        )
    assert expected.std() > 0.05
    assert float((ours - expected).abs().max()) < 1e-4


def test_a_whole_number_of_steps_is_that_number_where_diffusers_takes_one_more(made):
    from diffusers import StableDiffusion3Img2ImgPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = StableDiffusion3Img2ImgPipeline.from_pretrained(made[1])
    differing = {}
    for steps in range(1, 101):
        theirs.scheduler.set_timesteps(steps)
        grid = schedule.sigmas(steps)
        for percent in range(1, 101):
            ours = len(schedule.partial(grid, percent / 100)) - 1
            exact = -(-steps * percent // 100)
            assert ours == exact
            expected = theirs.get_timesteps(steps, percent / 100, "cpu")[1]
            if ours != expected:
                assert expected == exact + 1 and steps * percent % 100 == 0
                differing[steps, percent] = expected
    assert len(differing) == 6 and differing[50, 56] == 29


@pytest.mark.parametrize(("strength", "steps", "cfg"), [(0.6, 8, 5.0), (1.0, 5, 1.0)])
def test_the_latent_blend_of_inpainting_equals_diffusers(made, run_theirs, strength, steps, cfg):
    model, _ = made
    noise = prng.normal(prng.key(1), (2, 16, 8, 12))
    images = prng.uniform(prng.key(2), (2, 3, 64, 96))
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., 10:50, 30:77] = 1
    options = {"height": 64, "width": 96, "strength": strength, "num_inference_steps": steps, "guidance_scale": cfg}
    latents = run_theirs("StableDiffusion3InpaintPipeline", noise, images, mask_image=mask, output="latent", **options)
    with torch.no_grad():
        expected = pipeline.decode(model.params, model.config, latents)
        ours = pipeline.inpaint(
            *parts(model), PROMPTS, images, mask, prng.key(0), noise=noise, strength=strength, steps=steps, cfg=cfg
        )
    assert float((ours - expected).abs().max()) < 1e-4
    # What they make images of is not shifted: theirs are those of other latents.
    inpainted = run_theirs("StableDiffusion3InpaintPipeline", noise, images, mask_image=mask, **options)
    with torch.no_grad():
        unshifted = vae.decode(model.params["vae"], model.config.vae, latents / model.config.vae.scaling)
    torch.testing.assert_close(inpainted, (unshifted / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)
    assert float((inpainted - expected).abs().max()) > 1e-3
