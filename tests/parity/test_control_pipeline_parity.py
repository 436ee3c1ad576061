"""Images with ControlNets against diffusers' StableDiffusion3ControlNetPipeline."""

import dataclasses
import warnings

import pytest
import torch

from functional_sd3 import pipeline, weights
from functional_sd3.core import prng
from functional_sd3.core import spec as specs
from functional_sd3.transformer import controlnet
from functional_sd3.transformer.control import Control
from functional_sd3.weights.controlnets import ControlNet
from tests import models
from tests.models import parts

PROMPTS = ["a large red circle on a white background", "a small blue star"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Our model, its folder, and two ControlNets for it, one of each kind, with their folders."""
    root = tmp_path_factory.mktemp("controlled")
    model = models.random_model()
    weights.save(root / "model", model)
    sizes = {
        name: getattr(model.config.transformer, name)
        for name in ("heads", "head_dim", "context_width", "pooled_width", "position_size", "sample_size")
    }
    joint = controlnet.Config(depth=2, **sizes)
    alone = dataclasses.replace(
        joint, depth=2, context_width=None, has_patch_embedding=False, position_size=None, zero_pooled=False
    )
    nets = {}
    for name, config in (("joint", joint), ("alone", alone)):
        generator = torch.Generator().manual_seed(3)

        def leaf(path, param, generator=generator):
            if not param.trainable:
                return param.init(prng.key(0), param.shape)
            return 0.15 * torch.randn(param.shape, generator=generator)

        nets[name] = ControlNet(specs.map_params(leaf, controlnet.spec(config)), config)
        weights.save_controlnet(root / name, nets[name])
    return weights.load(root / "model"), root, nets


def run_theirs(root, names, noise, images, monkeypatch, **options):
    from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    # They draw the control's latents from a global generator; the mean is what can be compared.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nets = [SD3ControlNetModel.from_pretrained(root / name) for name in names]
        theirs = StableDiffusion3ControlNetPipeline.from_pretrained(
            root / "model", controlnet=nets if len(nets) > 1 else nets[0]
        )
        theirs.set_progress_bar_config(disable=True)
        return theirs(
            PROMPTS,
            control_image=images if len(nets) > 1 else images[0],
            latents=noise,
            height=noise.shape[-2] * 8,
            width=noise.shape[-1] * 8,
            max_sequence_length=24,
            num_inference_steps=6,
            guidance_scale=4.0,
            output_type="pt",
            **options,
        ).images


@pytest.mark.parametrize("names", [("joint",), ("alone",), ("joint", "joint")], ids="+".join)
def test_pixels_equal_diffusers(made, names, monkeypatch):
    model, root, nets = made
    noise = prng.normal(prng.key(7), (2, 16, 8, 12))
    control_images = [prng.uniform(prng.key(8 + index), (2, 3, 64, 96)) for index in range(len(names))]
    numbers = [(0.8, 0.0, 0.7), (0.5, 0.3, 1.0)][: len(names)]
    with torch.no_grad():
        controls = [
            Control(
                *nets[name],
                pipeline.control_latents(model.params, model.config, img, nets[name].config),
                scale=scale,
                start=start,
                end=end,
            )
            for name, img, (scale, start, end) in zip(names, control_images, numbers, strict=True)
        ]
        options = {"noise": noise, "steps": 6, "cfg": 4.0}
        images = pipeline.generate(*parts(model), PROMPTS, prng.key(0), control=controls, **options)
        plain = pipeline.generate(*parts(model), PROMPTS, prng.key(0), **options)
    single = len(names) == 1
    scale, start, end = (numbers[0][i] if single else [row[i] for row in numbers] for i in range(3))
    expected = run_theirs(
        root,
        names,
        noise,
        [2 * img - 1 for img in control_images],
        monkeypatch,
        controlnet_conditioning_scale=scale,
        control_guidance_start=start,
        control_guidance_end=end,
    )
    assert float((images - plain).abs().max()) > 0.02
    assert float((images - expected).abs().max()) < 1e-4


def test_cannys_odd_range_is_that_of_stabilitys_image_processor(made):
    from diffusers.image_processor import VaeImageProcessor

    model, _, nets = made
    canny = dataclasses.replace(nets["alone"].config, kind="canny")
    img = prng.uniform(prng.key(3), (1, 3, 64, 64))
    # As documented beside diffusers' pipeline for Stability's file: not normalised, then x * 255 * 0.5 + 0.5.
    seen = VaeImageProcessor(do_normalize=False).preprocess(img) * 255 * 0.5 + 0.5
    from functional_sd3.image import vae

    expected = vae.normalize(model.config.vae, vae.encode(model.params["vae"], model.config.vae, seen).mean)
    assert torch.equal(pipeline.control_latents(model.params, model.config, img, canny), expected)
    joint = dataclasses.replace(nets["joint"].config, kind="canny")
    plain = pipeline.control_latents(model.params, model.config, img, nets["joint"].config)
    assert torch.equal(pipeline.control_latents(model.params, model.config, img, joint), plain)


def test_a_mask_hides_the_image_and_is_encoded_as_in_diffusers(made):
    from diffusers import AutoencoderKL
    from diffusers.pipelines.controlnet_sd3 import pipeline_stable_diffusion_3_controlnet_inpainting as inpainting

    model, root, nets = made
    net = dataclasses.replace(nets["joint"].config, extra_channels=1)
    img, mask = prng.uniform(prng.key(3), (1, 3, 64, 64)), (prng.uniform(prng.key(4), (1, 1, 64, 64)) > 0.6).float()

    class Theirs:
        vae = AutoencoderKL.from_pretrained(root / "model" / "vae")
        vae_scale_factor = 8
        prepare = inpainting.StableDiffusion3ControlNetInpaintingPipeline.prepare_image_with_mask

    theirs = Theirs()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        expected = theirs.prepare(2 * img - 1, mask, 64, 64, 1, 1, "cpu", torch.float32)
    ours = pipeline.control_latents(model.params, model.config, img, net, mask=mask)
    assert ours.shape == (1, 17, 8, 8)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="reads 1 channels beside the latents: it wants a mask"):
        pipeline.control_latents(model.params, model.config, img, net)
