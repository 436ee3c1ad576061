"""TAESD as functions: shapes, errors, and every transform."""

import pytest
import torch

from functional_sd3.core import prng, tree
from functional_sd3.image import taesd

SMALL = taesd.Config(width=4, latent_channels=3, encoder_blocks=(1, 0, 2), decoder_blocks=(2, 1, 0))


@pytest.fixture(scope="module")
def params():
    return taesd.init(prng.key(0), SMALL)


def test_the_released_size_has_its_published_number_of_parameters():
    assert tree.count(taesd.init(prng.key(0), taesd.TAESD3, device="meta")) == 2_458_899


def test_images_become_latents_a_factor_smaller_and_back(params):
    assert taesd.factor(SMALL) == 4
    latents = taesd.encode(params, SMALL, torch.zeros(2, 3, 16, 24))
    assert latents.shape == (2, 3, 4, 6)
    assert taesd.decode(params, SMALL, latents).shape == (2, 3, 16, 24)


def test_latents_are_softly_clamped_to_three(params):
    huge = torch.full((1, 3, 2, 2), 1e4)
    assert torch.equal(taesd.decode(params, SMALL, huge), taesd.decode(params, SMALL, 10 * huge))


def test_a_batch_is_decoded_image_by_image_and_vmap_gives_the_same(params):
    latents = prng.normal(prng.key(1), (3, 3, 2, 2))
    together = taesd.decode(params, SMALL, latents)
    alone = torch.func.vmap(lambda one: taesd.decode(params, SMALL, one[None])[0])(latents)
    assert torch.allclose(together, alone, atol=1e-6)


def test_gradients_reach_every_parameter(params):
    def loss(params):
        return taesd.decode(params, SMALL, taesd.encode(params, SMALL, images)).square().mean()

    images = prng.normal(prng.key(2), (1, 3, 16, 16))
    gradients = torch.func.grad(loss)(params)
    assert all(gradient.abs().sum() > 0 for gradient in tree.leaves(gradients))
    _, tangent = torch.func.jvp(loss, (params,), (params,))
    expected = sum((g * p).sum() for g, p in zip(tree.leaves(gradients), tree.leaves(params), strict=True))
    assert torch.allclose(tangent, expected, rtol=1e-4)


def test_other_shapes_are_refused(params):
    with pytest.raises(ValueError, match=r"images of shape \[3, 8, 8\] must be \(batch, 3, height, width\)"):
        taesd.encode(params, SMALL, torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"must be \(batch, 3, height, width\)"):
        taesd.decode(params, SMALL, torch.zeros(1, 16, 2, 2))
