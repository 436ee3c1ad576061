"""The autoencoder against diffusers' AutoencoderKL on random weights."""

import pytest
import torch

from bench import peers
from functional_sd3.core import prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.image import vae
from functional_sd3.layouts import diffusers_keys

CONFIGS = {
    "two blocks a level": vae.Config(channels=(16, 32, 32, 32), blocks_per_level=2, groups=8, sample_size=64),
    "one block, one group": vae.Config(channels=(8, 16, 24, 24), blocks_per_level=1, groups=1, sample_size=64),
    "three levels": vae.Config(channels=(16, 24, 32), blocks_per_level=2, groups=4, latent_channels=4, sample_size=32),
}


def reference(config: vae.Config):
    model = peers.autoencoder_module(config)
    generator = torch.Generator().manual_seed(0)
    # Residual branches that start at zero would hide mistakes in them.
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5 / parameter[0].numel() ** 0.5
    return model.eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(64, 64), (72, 104), (8, 24)])
def test_encode_and_decode_equal_diffusers(name, size):
    config = CONFIGS[name]
    model = reference(config)
    params = peers.parameters_of(model, diffusers_keys.VAE, vae.spec(config))
    images = prng.uniform(prng.key(1), (2, 3, *size)) * 2 - 1
    with torch.no_grad():
        theirs = model.encode(images).latent_dist
        posterior = vae.encode(params, config, images)
        assert relative(posterior.mean, theirs.mean) < 1e-5
        assert relative(posterior.logvar, theirs.logvar) < 1e-5
        assert relative(vae.decode(params, config, posterior.mean), model.decode(posterior.mean).sample) < 1e-5


def test_bfloat16_is_near_float32():
    config = CONFIGS["two blocks a level"]
    params = peers.parameters_of(reference(config), diffusers_keys.VAE, vae.spec(config))
    images = prng.uniform(prng.key(1), (2, 3, 64, 64)) * 2 - 1
    half = tree.cast(params, torch.bfloat16)
    exact = vae.encode(params, config, images).mean
    assert relative(vae.encode(half, config, images.bfloat16()).mean.float(), exact) < 2e-2
    assert relative(vae.decode(half, config, exact.bfloat16()).float(), vae.decode(params, config, exact)) < 2e-2


def test_the_released_size_has_the_released_count():
    spec = vae.spec(vae.SD3_VAE)
    assert specs.count(spec["encoder"]) == 34_274_208
    assert specs.count(spec["decoder"]) == 49_545_475
