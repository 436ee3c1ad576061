"""Laws of the whole composition."""

import pytest
import torch

from functional_sd3 import pipeline
from functional_sd3.core import prng, tree
from functional_sd3.flow import ode
from tests.models import parts


def test_an_image_does_not_depend_on_its_batch(model):
    prompts = ["a red circle", "a blue star", "a green ring"]
    keys = prng.split(prng.key(1), 3)
    together = pipeline.generate(*parts(model), prompts, keys, steps=3)
    for index, prompt in enumerate(prompts):
        alone = pipeline.generate(*parts(model), prompt, keys[index : index + 1], steps=3)
        torch.testing.assert_close(alone[0], together[index], atol=1e-4, rtol=0)


def test_one_key_gives_each_sample_its_own_noise_whatever_the_count(model):
    two = pipeline.initial_noise(prng.key(3), model.config, 2)
    three = pipeline.initial_noise(prng.key(3), model.config, 3)
    assert torch.equal(two, three[:2]) and not torch.equal(three[0], three[1])


@pytest.mark.parametrize("method", ["euler", "heun", "dpmpp_2m", "rk4"])
def test_modulations_computed_once_equal_those_of_every_step(model, method):
    conditions = pipeline.encode(*parts(model), ["a red circle"])
    noise = pipeline.initial_noise(prng.key(2), model.config, 1)
    times = pipeline.sigmas(model.config, noise, 3)
    plain = pipeline.velocity(model.params, model.config, conditions, 5.0)
    expected = ode.integrate(ode.METHODS[method], plain, noise, times)
    latents = pipeline.sample(model.params, model.config, conditions, noise, steps=3, method=ode.METHODS[method])
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:the text encoder")
def test_every_text_encoder_may_be_absent(model):
    for absent in ("clip_l", "clip_g", "t5"):
        params = {name: part for name, part in model.params.items() if name != absent}
        images = pipeline.generate(params, model.config, model.tokenizers, "a red circle", prng.key(0), steps=2)
        assert images.shape == (1, 3, 64, 64)


def test_the_image_is_differentiable_in_noise_and_scale(model):
    noise = pipeline.initial_noise(prng.key(4), model.config, 1).requires_grad_()
    scale = torch.tensor(3.0, requires_grad=True)
    image = pipeline.generate(*parts(model), "a red circle", prng.key(0), noise=noise, cfg=scale, steps=2)
    gradients = torch.autograd.grad(image.mean(), (noise, scale))
    assert all(torch.isfinite(gradient).all() and gradient.abs().max() > 0 for gradient in gradients)


def test_steps_are_reported_in_order(model):
    seen = []
    pipeline.generate(*parts(model), "a red circle", prng.key(0), steps=4, on_step=lambda info: seen.append(info.index))
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 65}, "height 65 is not a multiple of 16; nearest are 64 and 80"),
        ({"width": 8}, "width 8 is not a multiple of 16; the least is 16"),
        ({"width": 400}, "width 400 is beyond the 192 pixels"),
        ({"steps": 0}, "steps 0"),
        ({"negative": ["a", "b"]}, "2 negative prompts for 1 prompts"),
    ],
)
def test_what_cannot_be_drawn_is_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline.generate(*parts(model), "a red circle", prng.key(0), **options)


def test_nothing_is_changed_and_no_state_is_kept(model):
    before, state = tree.map(torch.clone, model.params), torch.get_rng_state()
    first = pipeline.generate(*parts(model), "a red circle", prng.key(0), steps=2)
    pipeline.generate(*parts(model), "a blue star", prng.key(1), steps=3)
    assert torch.equal(first, pipeline.generate(*parts(model), "a red circle", prng.key(0), steps=2))
    assert tree.allclose(before, model.params, rtol=0, atol=0) and torch.equal(state, torch.get_rng_state())


def test_a_transform_of_the_block_is_applied_to_every_block_of_every_step_and_changes_nothing(model):
    calls = []

    def counted(block):
        return lambda *arguments: calls.append(1) or block(*arguments)

    plain = pipeline.generate(*parts(model), "a red circle", prng.key(0), steps=3)
    found = pipeline.generate(*parts(model), "a red circle", prng.key(0), steps=3, block_transform=counted)
    assert torch.equal(found, plain)
    assert len(calls) == 3 * model.config.transformer.depth


@pytest.mark.parametrize(
    ("prompts", "key", "options", "message"),
    [
        (["a"], 0, {}, r"key is 0; a key is an int64 tensor .*prng.key\(seed\)"),
        (["a"], prng.key(0), {"cfg": torch.tensor([2.0, 3.0])}, r"cfg \[2\] must be one number, or \(1,\): one"),
        (["a"], prng.key(0), {"steps": "3"}, "steps '3' must be a whole number"),
        ([], prng.key(0), {}, "there are no prompts"),
    ],
)
def test_arguments_of_another_kind_are_named(model, prompts, key, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline.generate(*parts(model), prompts, key, **{"steps": 1, **options})
