"""The autoencoder at its true size."""

import pytest
import torch

from bench import openvino_peer, peers
from functional_sd3.core import prng
from functional_sd3.image import vae


@pytest.fixture(scope="module")
def pair():
    return peers.autoencoder()


def test_encode(versus, pair):
    images = prng.normal(prng.key(0), (1, 3, 256, 256))
    versus(
        "VAE encode, 256x256",
        lambda: vae.encode(pair.params, pair.config, images).mean,
        lambda: pair.module.encode(images).latent_dist.mean,
        rounds=5,
        memory=True,
    )


def test_decode(versus, pair):
    latents = prng.normal(prng.key(0), (1, 16, 32, 32))
    versus(
        "VAE decode, 256x256",
        lambda: vae.decode(pair.params, pair.config, latents),
        lambda: pair.module.decode(latents, return_dict=False)[0],
        rounds=5,
        memory=True,
        beside=openvino_peer.beside(
            lambda latents: pair.module.decode(latents, return_dict=False)[0],
            (latents,),
            pair.module,
            dtype=torch.float32,
        ),
    )


def test_tiled_decode(versus, pair):
    latents = prng.normal(prng.key(0), (1, 16, 64, 64))
    pair.module.enable_tiling()
    pair.module.tile_sample_min_size, pair.module.tile_latent_min_size = 256, 32
    try:
        versus(
            "VAE decode in tiles of 256x256, 512x512",
            lambda: vae.decode_tiled(pair.params, pair.config, latents, tile=32, overlap=8),
            lambda: pair.module.decode(latents, return_dict=False)[0],
            # The two blend their seams differently.
            tolerance=None,
            rounds=3,
            memory=True,
        )
    finally:
        pair.module.disable_tiling()
