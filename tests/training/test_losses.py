import math

import pytest
import torch

from functional_sd3.core import prng, tree
from functional_sd3.flow import path
from functional_sd3.image import vae
from functional_sd3.training import objectives
from functional_sd3.training.objectives import flow
from functional_sd3.transformer import mmdit

KEYS = prng.split(prng.key(3), 4)


def test_the_bins_add_up_to_the_loss_and_to_all_samples(tiny):
    value, metrics = objectives.flow_loss(tiny.config, bins=5)(tiny.params, tiny.batch, KEYS)
    torch.testing.assert_close(metrics["bin_loss"].sum(), value)
    torch.testing.assert_close(metrics["bin_share"].sum(), torch.tensor(1.0))
    assert metrics["bin_loss"].shape == (5,)
    assert (metrics["bin_loss"][metrics["bin_share"] == 0] == 0).all()


def test_a_bin_holds_the_samples_with_its_times(tiny):
    fixed = torch.tensor([0.0, 0.15, 0.95, 1.0])
    loss = objectives.flow_loss(tiny.config, density=lambda key, shape: fixed)
    _, metrics = loss(tiny.params, tiny.batch, KEYS)
    torch.testing.assert_close(metrics["bin_share"], torch.tensor([1, 1, 0, 0, 0, 0, 0, 0, 0, 2]) / 4)


def test_a_sample_is_drawn_by_its_own_key_alone(tiny):
    loss = objectives.flow_loss(tiny.config, dropout=0.5, empty=tiny.empty)
    whole, _ = loss(tiny.params, tiny.batch, KEYS)
    alone = [
        loss(tiny.params, tree.map(lambda leaf, i=i: leaf[i : i + 1], tiny.batch), KEYS[i : i + 1])[0] for i in range(4)
    ]
    torch.testing.assert_close(torch.stack(alone).mean(), whole)


def test_the_loss_is_that_of_the_path_for_the_noise_of_the_keys(tiny):
    params = {"transformer": tiny.params["transformer"]}
    batch = {"latents": tiny.batch["latents"], "context": torch.ones(4, 3, 32), "pooled": torch.ones(4, 32)}
    value, _ = objectives.flow_loss(tiny.config, shift=3.0)(params, batch, KEYS)
    times, noises, _ = prng.split(KEYS, 3).unbind(1)
    t = torch.sigmoid(prng.normal(times))
    t = 3 * t / (1 + 2 * t)
    noise = prng.normal(noises, (16, 4, 4))
    expected = path.loss(
        lambda x, t: mmdit.apply(
            params["transformer"], tiny.config.transformer, x, t, batch["context"], batch["pooled"]
        ),
        batch["latents"],
        noise,
        t,
    )
    torch.testing.assert_close(value, expected.mean())


def test_dropping_every_caption_leaves_the_empty_prompt(tiny):
    dropped, _ = objectives.flow_loss(tiny.config, dropout=1.0, empty=tiny.empty)(tiny.params, tiny.batch, KEYS)
    blank = {"latents": tiny.batch["latents"], "ids": tree.map(torch.zeros_like, tiny.batch["ids"])}
    expected, _ = objectives.flow_loss(tiny.config)(tiny.params, blank, KEYS)
    given, _ = objectives.flow_loss(tiny.config)(tiny.params, tiny.batch, KEYS)
    torch.testing.assert_close(dropped, expected)
    assert not torch.allclose(dropped, given)


def test_dropout_drops_its_share_of_the_samples(tiny):
    text = {"pooled": torch.ones(2000, 1)}
    drop = prng.bernoulli(prng.split(prng.key(0), 2000), 0.3, ())
    kept = flow._dropped(text, {"pooled": torch.zeros(1, 1)}, drop)["pooled"]
    assert float(kept.mean()) == pytest.approx(0.7, abs=0.04)


def test_dropout_without_an_empty_prompt_is_refused(tiny):
    with pytest.raises(ValueError, match="dropout 0.1 needs `empty`"):
        objectives.flow_loss(tiny.config, dropout=0.1)
    with pytest.raises(ValueError, match="dropout 1.5 is a probability"):
        objectives.flow_loss(tiny.config, dropout=1.5, empty=tiny.empty)


def test_bfloat16_computes_nearly_the_same_with_float32_gradients(tiny):
    exact, _ = objectives.flow_loss(tiny.config)(tiny.params, tiny.batch, KEYS)
    inputs = tree.map(lambda leaf: leaf.clone().requires_grad_(), tiny.params)
    coarse, metrics = objectives.flow_loss(tiny.config, dtype=torch.bfloat16)(inputs, tiny.batch, KEYS)
    assert coarse.dtype == torch.float32 and metrics["bin_loss"].dtype == torch.float32
    torch.testing.assert_close(coarse.detach(), exact, rtol=2e-2, atol=0)
    coarse.backward()
    assert inputs["transformer"]["patch"]["weight"].grad.dtype == torch.float32


CONFIG = vae.Config(channels=(4, 8), blocks_per_level=1, groups=2, latent_channels=4)
IMAGES = {"images": 2 * prng.uniform(prng.key(1), (4, 3, 8, 8)) - 1}


def test_the_autoencoders_loss_is_reconstruction_and_a_little_divergence():
    params = vae.init(prng.key(0), CONFIG)
    value, metrics = objectives.vae_loss(CONFIG, divergence=0.0)(params, IMAGES, KEYS)
    torch.testing.assert_close(value, metrics["reconstruction"])
    weighed, metrics = objectives.vae_loss(CONFIG, divergence=0.5)(params, IMAGES, KEYS)
    # 4 x 4 x 4 latents to 3 x 8 x 8 pixel values.
    torch.testing.assert_close(weighed, metrics["reconstruction"] + 0.5 * metrics["kl"] * 64 / 192)


def test_the_divergence_of_the_standard_normal_is_nothing():
    params = tree.map(torch.zeros_like, vae.init(prng.key(0), CONFIG))
    _, metrics = objectives.vae_loss(CONFIG)(params, IMAGES, KEYS)
    assert float(metrics["kl"]) == 0.0
    assert float(metrics["reconstruction"]) == pytest.approx(float(IMAGES["images"].abs().mean()))
    assert float(metrics["latent_mean"]) == 0.0 and float(metrics["latent_square"]) == pytest.approx(1.0)


def test_psnr_of_a_black_answer_is_that_of_its_error_in_unit_range():
    params = tree.map(torch.zeros_like, vae.init(prng.key(0), CONFIG))
    _, metrics = objectives.vae_loss(CONFIG)(params, {"images": torch.full((4, 3, 8, 8), 0.2)}, KEYS)
    assert float(metrics["psnr"]) == pytest.approx(20.0, abs=1e-3)


def test_edges_cost_only_where_images_change():
    params = tree.map(torch.zeros_like, vae.init(prng.key(0), CONFIG))
    flat = {"images": torch.full((4, 3, 8, 8), 0.2)}
    for images, more in ((flat, False), (IMAGES, True)):
        plain, _ = objectives.vae_loss(CONFIG)(params, images, KEYS)
        sharp, _ = objectives.vae_loss(CONFIG, edges=1.0)(params, images, KEYS)
        assert bool(sharp > plain) is more


def test_the_difference_of_gradients_is_that_of_every_scale():
    params = tree.map(torch.zeros_like, vae.init(prng.key(0), CONFIG))
    images = IMAGES["images"]
    plain, _ = objectives.vae_loss(CONFIG)(params, IMAGES, KEYS)
    expected = 0.0
    for scale in range(3):
        side = 2**scale
        means = images.unfold(2, side, side).unfold(3, side, side).mean((-1, -2))
        across, down = means[..., 1:] - means[..., :-1], means[..., 1:, :] - means[..., :-1, :]
        expected = expected + 0.5 * (across.abs().mean() + down.abs().mean())
        value, _ = objectives.vae_loss(CONFIG, edges=0.5, scales=scale + 1)(params, IMAGES, KEYS)
        torch.testing.assert_close(value - plain, expected)


def test_without_noise_the_mean_of_the_posterior_is_decoded():
    params = vae.init(prng.key(0), CONFIG)
    mean = vae.encode(params, CONFIG, IMAGES["images"]).mean
    decoded = vae.decode(params, CONFIG, mean)
    value, metrics = objectives.vae_loss(CONFIG, divergence=0.0, noise=0.0)(params, IMAGES, KEYS)
    torch.testing.assert_close(value, (decoded - IMAGES["images"]).abs().mean())
    noisy, _ = objectives.vae_loss(CONFIG, divergence=0.0)(params, IMAGES, KEYS)
    assert float(noisy) != float(value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"edges": -1.0}, "edges -1.0 must be a finite number of at least 0"),
        ({"edges": math.inf}, "edges inf must be"),
        ({"noise": math.nan}, "noise nan must be"),
        ({"scales": 0}, "scales 0 must be at least 1"),
        ({"scales": 2}, "scales 2 are those of `edges`, whose weight is 0"),
        ({"edges": 1.0, "scales": 4}, "scales 4 .* 8 x 8"),
    ],
)
def test_weights_of_the_autoencoder_that_are_none_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        objectives.vae_loss(CONFIG, **options)(vae.init(prng.key(0), CONFIG), IMAGES, KEYS)


@pytest.mark.parametrize("part", ["flow", "vae"])
def test_keys_are_one_a_sample(part):
    batch = {"images": torch.zeros(3, 3, 8, 8), "latents": torch.zeros(3, 4, 2, 2)}
    loss = objectives.vae_loss(None) if part == "vae" else objectives.flow_loss(None)
    with pytest.raises(ValueError, match=r"keys \[2\] must be \(3, 2\), one a sample: prng.split\(key, 3\)"):
        loss({}, batch, prng.key(0))
    with pytest.raises(ValueError, match="key is 7; a key is an int64 tensor"):
        loss({}, batch, 7)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"latents": torch.zeros(1, 16, 8, 8)}, "no context and no pooled"),
        ({"latents": torch.zeros(1, 16, 8, 8), "context": torch.zeros(1, 2, 8)}, "the batch has no pooled"),
        ({"ids": None}, "the batch has no latents"),
        ({"latents": torch.zeros(0, 16, 8, 8), "ids": None}, "must be of one sample at least"),
    ],
)
def test_a_batch_that_lacks_something_is_named(batch, message):
    keys = prng.split(prng.key(0), 2)[: len(batch.get("latents", ""))]
    with pytest.raises(ValueError, match=message):
        objectives.flow_loss(None)({}, batch, keys)
