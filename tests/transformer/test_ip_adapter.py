"""Image prompts: scale 0, batches, guidance, transforms and errors."""

import dataclasses
import pickle

import pytest
import torch
from torch.func import grad, vmap

from functional_sd3 import pipeline
from functional_sd3.core import prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.formats import files
from functional_sd3.transformer import ip_adapter, mmdit
from functional_sd3.transformer.ip_adapter import ImagePrompt
from functional_sd3.weights import WeightsError, load_ip_adapter
from tests import models
from tests.models import parts

MODEL = models.random_model()
TRANSFORMER = MODEL.config.transformer
CONFIG = ip_adapter.Config(
    attentions=TRANSFORMER.depth + len(TRANSFORMER.dual_attention_layers), width=TRANSFORMER.width,
    head_dim=TRANSFORMER.head_dim, image_width=10, hidden_width=24, depth=2, heads=2, resampler_head_dim=8, tokens=5,
    mlp_width=48, time_frequencies=16,
)  # fmt: skip


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def leaf(path, param):
    return 0.3 * random(len(path), *param.shape) + (1.0 if path.endswith("norm.weight") else 0.0)


ADAPTER = specs.map_params(leaf, ip_adapter.spec(CONFIG))
FEATURES = random(1, 3, 7, 10)


def inputs(batch: int = 3) -> tuple[torch.Tensor, ...]:
    width, pooled = TRANSFORMER.context_width, TRANSFORMER.pooled_width
    return random(2, batch, 16, 6, 8), random(3, batch).sigmoid(), random(4, batch, 5, width), random(5, batch, pooled)


def velocity(adapter, features, scale, latents, t, context, pooled, implementation="sdpa"):
    arguments = ip_adapter.apply(adapter, CONFIG, features, t, TRANSFORMER, scale, implementation=implementation)
    weights = MODEL.params["transformer"]
    return mmdit.apply(
        weights, TRANSFORMER, latents, t, context, pooled, image_prompt=arguments, implementation=implementation
    )


def close(first, second, tolerance=1e-5):
    return not tree.diff(first, second, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [0.0, torch.tensor(0.0), torch.zeros(3)])
def test_scale_zero_is_no_image_prompt_to_the_bit(scale):
    plain = mmdit.apply(MODEL.params["transformer"], TRANSFORMER, *inputs())
    assert torch.equal(velocity(ADAPTER, FEATURES, scale, *inputs()), plain)
    assert not close(velocity(ADAPTER, FEATURES, scale + 1.0, *inputs()), plain, 1e-2)


def test_each_sample_is_its_own():
    scale = torch.tensor([0.3, 0.6, 0.9])
    together = velocity(ADAPTER, FEATURES, scale, *inputs())
    for index in range(3):
        one = [part[index : index + 1] for part in (FEATURES, scale, *inputs())]
        assert close(velocity(ADAPTER, *one), together[index : index + 1])


def test_vmap_and_grad_work():
    def one(features, scale, *sample):
        parts = (part[None] for part in sample)
        return velocity(ADAPTER, features[None], scale, *parts)[0]

    scale = torch.full((3,), 0.5)
    assert close(vmap(one)(FEATURES, scale, *inputs()), velocity(ADAPTER, FEATURES, scale, *inputs()))

    def loss(adapter, features, scale):
        return velocity(adapter, features, scale, *inputs()).square().mean()

    gradients = grad(loss, argnums=(0, 1, 2))(ADAPTER, FEATURES, torch.tensor(0.5))
    assert all(part.abs().max() > 0 for part in tree.leaves(list(gradients)))


@pytest.mark.parametrize("narrow", ["transformer", "adapter", "both"])
def test_adapter_and_transformer_may_be_of_different_dtypes(narrow):
    exact = velocity(ADAPTER, FEATURES, torch.full((3,), 0.7), *inputs())
    adapter = ADAPTER if narrow == "transformer" else tree.cast(ADAPTER, torch.bfloat16)
    arguments = ip_adapter.apply(adapter, CONFIG, FEATURES, inputs()[1], TRANSFORMER, torch.full((3,), 0.7))
    weights = MODEL.params["transformer"]
    weights = weights if narrow == "adapter" else tree.cast(weights, torch.bfloat16)
    actual = mmdit.apply(weights, TRANSFORMER, *inputs(), image_prompt=arguments)
    assert actual.dtype == torch.float32 and (actual - exact).norm() <= 3e-2 * exact.norm()


def test_the_negative_velocity_of_guidance_gets_zero_features():
    conditions = pipeline.encode(*parts(MODEL), ["a red circle"] * 3)
    prompt = ImagePrompt(ADAPTER, CONFIG, FEATURES, 0.7)
    x, t = random(6, 3, 16, 8, 8), torch.tensor(0.4)
    guided = pipeline.velocity(MODEL.params, MODEL.config, conditions, 3.0, image_prompt=prompt)(x, t)
    ends = [
        velocity(ADAPTER, features, 0.7, x, t, *condition)
        for features, condition in ((0 * FEATURES, conditions.negative), (FEATURES, conditions.positive))
    ]
    assert close(guided, ends[0] + 3.0 * (ends[1] - ends[0]), 1e-4)


def test_an_image_follows_the_image_prompt():
    options = {"steps": 2, "cfg": 3.0}
    plain = pipeline.generate(*parts(MODEL), "a red circle", prng.key(0), **options)
    prompt = ImagePrompt(ADAPTER, CONFIG, FEATURES[:1])
    shown = pipeline.generate(*parts(MODEL), "a red circle", prng.key(0), image_prompt=prompt, **options)
    unheard = prompt._replace(scale=0.0)
    again = pipeline.generate(*parts(MODEL), "a red circle", prng.key(0), image_prompt=unheard, **options)
    assert torch.equal(again, plain) and not close(shown, plain, 1e-3)
    with pytest.raises(ValueError, match="3 images of an image prompt for 1 samples"):
        pipeline.generate(
            *parts(MODEL), "a red circle", prng.key(0), image_prompt=prompt._replace(features=FEATURES), **options
        )


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="made for another model: its width is 48, the model's 32"):
        ip_adapter.check(dataclasses.replace(CONFIG, width=48), TRANSFORMER)
    with pytest.raises(ValueError, match="its attentions is 9, the model's 4"):
        ip_adapter.check(dataclasses.replace(CONFIG, attentions=9), TRANSFORMER)
    with pytest.raises(ValueError, match=r"features \[3, 7, 11\] must be"):
        velocity(ADAPTER, torch.zeros(3, 7, 11), 1.0, *inputs())
    with pytest.raises(ValueError, match="image_prompt is for 2 blocks, but the transformer has 3"):
        mmdit.apply(MODEL.params["transformer"], TRANSFORMER, *inputs(), image_prompt=[{}, {}])


def test_files_that_are_none_say_so(tmp_path):
    path = tmp_path / "ip-adapter.bin"
    torch.save({"image_proj": {}}, path)
    with pytest.raises(WeightsError, match="is a pickle, which may run code when it is opened"):
        load_ip_adapter(path)
    path.write_bytes(pickle.dumps({}))
    with pytest.raises(WeightsError):
        load_ip_adapter(path)
    files.write_atomic(path, {"image_proj.proj_in.weight": torch.zeros(4, 4)})
    with pytest.raises(WeightsError, match="image_proj.latents is missing: this is not an IP-Adapter of SD3.5"):
        load_ip_adapter(path)
