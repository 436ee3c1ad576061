"""The autoencoder's own laws."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from functional_sd3.core import layers, prng, tree
from functional_sd3.image import vae

CONFIG = vae.Config(channels=(8, 8, 16, 16), blocks_per_level=1, groups=4, sample_size=32)


@pytest.fixture(scope="module")
def params():
    # Fresh residual branches are zero; noise makes every parameter matter.
    fresh = vae.init(prng.key(0), CONFIG)
    return tree.map(lambda leaf: leaf + 0.1 * prng.normal(prng.key(leaf.numel()), leaf.shape), fresh)


def test_a_sample_does_not_depend_on_its_batch(params):
    images = prng.uniform(prng.key(1), (3, 3, 32, 32))
    together = vae.encode(params, CONFIG, images).mean
    alone = torch.cat([vae.encode(params, CONFIG, image[None]).mean for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_normalize_and_denormalize_are_inverse():
    latents = prng.normal(prng.key(2), (2, 16, 4, 4))
    torch.testing.assert_close(vae.denormalize(vae.SD3_VAE, vae.normalize(vae.SD3_VAE, latents)), latents)
    assert vae.normalize(vae.SD3_VAE, torch.tensor(0.0609)) == 0
    assert float(vae.normalize(vae.SD3_VAE, torch.tensor(1.0609))) == pytest.approx(1.5305)


def test_a_draw_has_the_posterior_moments():
    posterior = vae.Posterior(torch.full((1, 16, 32, 32), 2.0), torch.full((1, 16, 32, 32), -2.0))
    draw = vae.sample(posterior, prng.key(3))
    assert float(draw.mean()) == pytest.approx(2.0, abs=0.02)
    assert float(draw.std()) == pytest.approx(0.3679, abs=0.01)


def test_tiles_as_large_as_the_image_are_the_plain_decode(params):
    latents = prng.normal(prng.key(4), (1, 16, 4, 6))
    assert torch.equal(
        vae.decode_tiled(params, CONFIG, latents, tile=6, overlap=2), vae.decode(params, CONFIG, latents)
    )


def test_tiles_blend_to_a_constant_image_without_seams():
    constant = tree.map(torch.zeros_like, vae.init(prng.key(0), CONFIG))
    constant["decoder"]["conv_out"]["bias"] = torch.tensor([0.1, 0.2, 0.3])
    decoded = vae.decode_tiled(constant, CONFIG, torch.zeros(1, 16, 13, 9), tile=4, overlap=2)
    expected = torch.tensor([0.1, 0.2, 0.3])[None, :, None, None].expand(1, 3, 104, 72)
    torch.testing.assert_close(decoded, expected)


def test_tiles_of_16_bits_blend_to_a_constant_image_to_the_bit():
    constant = tree.map(torch.zeros_like, vae.init(prng.key(0), CONFIG, dtype=torch.bfloat16))
    constant["decoder"]["conv_out"]["bias"] = torch.tensor([0.1, 0.2, 0.3], dtype=torch.bfloat16)
    decoded = vae.decode_tiled(constant, CONFIG, torch.zeros(1, 16, 13, 9, dtype=torch.bfloat16), tile=5, overlap=3)
    expected = constant["decoder"]["conv_out"]["bias"][None, :, None, None].expand(1, 3, 104, 72)
    assert decoded.dtype == torch.bfloat16 and torch.equal(decoded, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: vae.encode(p, CONFIG, torch.zeros(1, 3, 33, 32)),
            "height 33 is not a multiple of 8; nearest are 32 and 40",
        ),
        (lambda p: vae.encode(p, CONFIG, torch.zeros(1, 1, 32, 32)), r"\[1, 1, 32, 32\] must be \(batch, 3"),
        (lambda p: vae.decode(p, CONFIG, torch.zeros(1, 4, 4, 4)), "must be .batch, 16"),
        (lambda p: vae.decode_tiled(p, CONFIG, torch.zeros(1, 16, 4, 4), tile=4, overlap=4), "overlap 4 must be"),
    ],
)
def test_wrong_sizes_are_named(params, call, message):
    with pytest.raises(ValueError, match=message):
        call(params)


def test_every_transform_applies(params):
    latents = prng.normal(prng.key(5), (4, 16, 2, 2))

    def decode(x):
        return vae.decode(params, CONFIG, x)

    tangent = prng.normal(prng.key(6), latents.shape)
    value, forward = torch.func.jvp(decode, (latents,), (tangent,))
    pulled = torch.func.vjp(decode, latents)[1](value)[0]
    torch.testing.assert_close((forward * value).sum(), (pulled * tangent).sum(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        torch.vmap(lambda x: decode(x[None])[0])(latents), vae.decode(params, CONFIG, latents), atol=1e-5, rtol=1e-4
    )
    each = torch.vmap(torch.func.grad(lambda x: decode(x[None]).square().sum()))(latents)
    whole = torch.func.grad(lambda x: decode(x).square().sum())(latents)
    torch.testing.assert_close(each, whole, atol=1e-4, rtol=1e-3)


def test_compiled_equals_eager():
    # Two levels have every kind of layer, and compile in a fraction of the time.
    config = vae.Config(channels=(4, 8), blocks_per_level=1, groups=2, latent_channels=4, sample_size=8)
    params = tree.map(lambda leaf: leaf + 0.1, vae.init(prng.key(0), config))
    images = prng.uniform(prng.key(7), (4, 3, 8, 8))

    def loss(params):
        posterior = vae.encode(params, config, images)
        return (vae.decode(params, config, posterior.mean) - images).square().mean()

    decode = lambda latents: vae.decode(params, config, latents)  # noqa: E731
    latents = prng.normal(prng.key(8), (2, 4, 4, 4))
    torch.testing.assert_close(torch.compile(decode, fullgraph=True)(latents), decode(latents), rtol=1e-4, atol=1e-5)
    eager_grads, eager = torch.func.grad_and_value(loss)(params)
    # Traced and differentiated as for any backend, without the minutes that kernels take to build.
    grads, value = torch.compile(torch.func.grad_and_value(loss), backend="aot_eager", fullgraph=True)(params)
    torch.testing.assert_close(value, eager, rtol=1e-4, atol=1e-5)
    for path, leaf in tree.flatten_paths(eager_grads).items():
        torch.testing.assert_close(tree.flatten_paths(grads)[path], leaf, rtol=1e-3, atol=1e-4, msg=path)


def test_nothing_given_is_changed(params):
    images = prng.uniform(prng.key(8), (1, 3, 16, 16))
    before, copy, state = tree.map(torch.clone, params), images.clone(), torch.get_rng_state()
    vae.decode(params, CONFIG, vae.encode(params, CONFIG, images).mean)
    assert tree.allclose(before, params, rtol=0, atol=0) and torch.equal(copy, images)
    assert torch.equal(state, torch.get_rng_state()) and torch.get_default_dtype() == torch.float32


def test_no_images_are_no_latents_and_no_latents_no_images(params):
    # channels_last, as a decoded batch is: what the CPU's own group norm takes, where it is large.
    for channels_last in (False, True):
        images, latents = torch.zeros(0, 3, 32, 32), torch.zeros(0, 16, 4, 4)
        if channels_last:
            images, latents = (x.to(memory_format=torch.channels_last) for x in (images, latents))
        assert vae.encode(params, CONFIG, images).mean.shape == (0, 16, 4, 4)
        assert vae.decode(params, CONFIG, latents).shape == (0, 3, 32, 32)


def layouts_of_convolutions(run) -> list[tuple[bool, bool]]:
    """Of each convolution of a traced computation: whether its image and its weight are in channels_last."""
    seen = []

    class Convolutions(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default:
                seen.append(tuple(x.is_contiguous(memory_format=torch.channels_last) for x in args[:2]))
            return func(*args, **(kwargs or {}))

    with Convolutions():
        run()
    return seen


def test_a_decoder_in_channels_last_gives_the_same_images_and_gradients(params):
    last = layers.channels_last(params)
    leaves, plain = tree.flatten_paths(last), tree.flatten_paths(params)
    for path, leaf in leaves.items():
        assert torch.equal(leaf, plain[path]) and leaf.shape == plain[path].shape
        assert leaf.is_contiguous(memory_format=torch.channels_last) if leaf.ndim == 4 else leaf is plain[path]
    latents = prng.normal(prng.key(5), (2, 16, 4, 6))
    images = latents.contiguous(memory_format=torch.channels_last)
    run = lambda params, x: vae.decode(params, CONFIG, x)  # noqa: E731
    expected = run(params, latents)
    for found in (run(last, images), torch.compile(run, backend="aot_eager", fullgraph=True)(last, images)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = [
        torch.func.grad(lambda x, params=params: run(params, x).square().mean())(x)
        for params, x in ((params, latents), (last, images))
    ]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


def test_every_convolution_but_the_first_reads_channels_last_where_the_weights_are(params):
    latents = prng.normal(prng.key(5), (1, 16, 4, 6))
    first, *others = layouts_of_convolutions(lambda: vae.decode(layers.channels_last(params), CONFIG, latents))
    assert first[1] and len(others) > 20 and all(map(all, others))
    assert not any(map(all, layouts_of_convolutions(lambda: vae.decode(params, CONFIG, latents))))
