"""Pre-packed weights give the same results to the bit, in drawing, and the same derivatives."""

import pytest
import torch

from functional_sd3 import pipeline
from functional_sd3.core import dispatch, layers, prng, tree
from functional_sd3.kernels import onednn, products
from functional_sd3.transformer import mmdit
from functional_sd3.weights import prepack, quantize
from tests import choices, models


@pytest.fixture(autouse=True)
def every_layer_by_onednn(monkeypatch):
    choices.use(monkeypatch, choices.ALL)


@pytest.fixture(scope="module")
def model():
    return models.random_model()


def inputs(config, dtype=torch.float32, batch=2):
    keys = prng.split(prng.key(0), 3)
    shapes = (config.in_channels, 8, 8), (5, config.context_width), (config.pooled_width,)
    latents, context, pooled = (
        prng.normal(key, (batch, *shape)).to(dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    return latents, torch.tensor([0.3, 0.8][:batch]), context, pooled


def packed_paths(params):
    return {path for path, leaf in tree.flatten_paths(params).items() if leaf.is_mkldnn}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_velocity_of_prepacked_weights_is_that_of_plain_ones_to_the_bit(model, dtype):
    if dtype == torch.bfloat16 and not onednn.has_bfloat16():
        pytest.skip("needs a processor with AVX512")
    config = model.config.transformer
    plain = tree.cast(model.params["transformer"], dtype)
    packed = prepack.prepack(plain)
    given = inputs(config, dtype)
    assert "blocks.0.image.mlp.in.weight" in packed_paths(packed)
    assert torch.equal(mmdit.apply(packed, config, *given), mmdit.apply(plain, config, *given))


def test_images_of_prepacked_weights_are_those_of_plain_ones_to_the_bit(model):
    params, config, tokenizers = models.parts(model)
    packed = {**params, "transformer": prepack.prepack(params["transformer"])}
    drawn = [
        pipeline.generate(each, config, tokenizers, ["a red circle"], prng.key(1), steps=2, height=64, width=64)
        for each in (params, packed)
    ]
    assert torch.equal(*drawn)


def test_large_linear_layers_of_many_rows_are_packed_and_others_stay(model):
    params = model.params["transformer"]
    packed = packed_paths(prepack.prepack(params))
    last = f"blocks.{model.config.transformer.depth - 1}.context.attention.qkv.weight"
    for path, leaf in tree.flatten_paths(params).items():
        is_layer = path.endswith(".weight") and leaf.ndim == 2
        one_row = any(name in path.split(".") for name in ("modulation", "time", "pooled", "interval"))
        assert (path in packed) == (is_layer and not one_row and path != last), path


def test_small_layers_and_processors_of_another_choice_keep_plain_weights(model, monkeypatch):
    params = model.params["transformer"]
    monkeypatch.setattr(onednn, "SMALLEST_WEIGHT", 1 << 30)
    assert not packed_paths(prepack.prepack(params))
    choices.use(monkeypatch, products.FORMER)
    assert not packed_paths(prepack.prepack(params))


def test_layers_with_scales_or_loras_stay(model):
    params = model.params["transformer"]
    stored = quantize.quantize(params)
    assert not any(path.startswith("blocks") for path in packed_paths(prepack.prepack(stored)))
    layer = params["blocks"][0]["image"]["attention"]["out"]
    rank = {"down": torch.ones(1, layer["weight"].shape[1]), "up": torch.ones(layer["weight"].shape[0], 1)}
    assert not packed_paths(prepack.prepack({"out": {**layer, "low_rank": rank}}))


def test_unpacking_gives_the_weights_back(model):
    params = model.params["transformer"]
    back = prepack.unpack(prepack.prepack(params))
    assert not packed_paths(back)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tree.leaves(back), tree.leaves(params), strict=True))


def test_a_donated_tree_holds_the_packed_weights_itself(model):
    given = tree.map(torch.clone, model.params["transformer"])
    before = tree.flatten_paths(given)
    kept = prepack.prepack(given)
    assert all(leaf is before[path] for path, leaf in tree.flatten_paths(given).items())
    donated = prepack.prepack(given, donate=True)
    assert donated is given and packed_paths(given) == packed_paths(kept) != set()
    assert prepack.unpack(given, donate=True) is given and not packed_paths(given)


@pytest.mark.parametrize("of", ["gradient", "tangent", "mapped", "autograd", "formula"])
def test_derivatives_and_mapped_calls_are_those_of_plain_weights(model, of):
    config = model.config.transformer
    latents, t, *text = inputs(config)

    def result(params):
        def velocity(x):
            return mmdit.apply(params, config, x, t, *text)

        if of == "gradient":
            return torch.func.grad(lambda x: velocity(x).square().sum())(latents)
        if of == "tangent":
            return torch.func.jvp(velocity, (latents,), (latents,))[1]
        if of == "mapped":
            return torch.func.vmap(velocity)(torch.stack([latents, 2 * latents]))
        if of == "autograd":
            x = latents.clone().requires_grad_()
            return torch.autograd.grad(velocity(x).square().sum(), x)[0]
        with dispatch.plain():
            return velocity(latents)

    plain = model.params["transformer"]
    torch.testing.assert_close(result(prepack.prepack(plain)), result(plain), rtol=2e-5, atol=2e-5)


def test_a_lora_beside_a_packed_weight_is_added_as_beside_a_plain_one(model):
    layer = model.params["transformer"]["blocks"][0]["image"]["mlp"]["in"]
    outputs, inner = layer["weight"].shape
    rank = {"down": prng.normal(prng.key(1), (2, inner)), "up": prng.normal(prng.key(2), (outputs, 2))}
    x = prng.normal(prng.key(3), (7, inner))
    results = [layers.linear({**each, "low_rank": rank}, x) for each in (prepack.prepack(layer), layer)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
