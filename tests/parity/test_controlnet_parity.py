"""ControlNets of every kind against diffusers' SD3ControlNetModel, with random weights everywhere."""

import dataclasses

import pytest
import torch

from bench import peers
from functional_sd3.core import spec as specs
from functional_sd3.core import tree
from functional_sd3.layouts import controlnet as layouts
from functional_sd3.layouts import rules
from functional_sd3.layouts.diffusers_keys import TRANSFORMER
from functional_sd3.transformer import control, controlnet, mmdit
from functional_sd3.weights import load_controlnet, save_controlnet
from tests import models
from tests.parity.mmdit_models import (
    LAYOUTS,
    SMALL,
    random_inputs,
    random_params,
    relative_error,
    their_velocity,
)

diffusers = pytest.importorskip("diffusers")

TRANSFORMER_CONFIG = LAYOUTS["SD3.5-large"]
JOINT = controlnet.Config(**SMALL)
IMAGE_ONLY = controlnet.Config(
    **{**SMALL, "context_width": None, "position_size": None, "depth": 2}, has_patch_embedding=False, zero_pooled=False
)
KINDS = {
    "joint": JOINT,
    "joint, norms and dual": dataclasses.replace(JOINT, depth=2, qk_norm=True, dual_attention_layers=(0,)),
    "joint, no positions": dataclasses.replace(JOINT, depth=1, position_size=None),
    "joint, with a mask": dataclasses.replace(JOINT, depth=2, extra_channels=1),
    "joint, the transformer's patches": dataclasses.replace(
        JOINT, depth=2, has_patch_embedding=False, position_size=None
    ),
    "image alone": IMAGE_ONLY,
    "image alone, own patches": dataclasses.replace(IMAGE_ONLY, has_patch_embedding=True, position_size=24),
}


def random_controlnet(config: controlnet.Config, seed: int = 0) -> dict:
    return models.random_leaves(controlnet.spec(config), 0.1, seed + 10)


def pair(config: controlnet.Config, seed: int = 0):
    params = random_controlnet(config, seed)
    theirs = peers.controlnet_module(config)
    spec = controlnet.spec(config)
    theirs.load_state_dict(rules.to_theirs(layouts.DIFFUSERS, spec, tree.flatten_paths(params)), strict=True)
    return params, theirs


def img(config: controlnet.Config, seed: int = 5, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.in_channels + config.extra_channels, 20, 28, generator=generator)


def their_residuals(theirs, latents, t, context, pooled, image, scale):
    with torch.no_grad():
        text = None if theirs.context_embedder is None else context
        return theirs(latents, image, scale, text, pooled, 1000 * t, return_dict=False)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "math"])
def test_residuals_and_the_velocity_with_them_equal_diffusers(kind, implementation):
    config = KINDS[kind]
    transformer = random_params(TRANSFORMER_CONFIG)
    their_transformer = peers.transformer_module(TRANSFORMER_CONFIG)
    spec = mmdit.spec(TRANSFORMER_CONFIG)
    their_transformer.load_state_dict(rules.to_theirs(TRANSFORMER, spec, tree.flatten_paths(transformer)), strict=True)
    params, theirs = pair(config)
    latents, t, context, pooled = random_inputs(TRANSFORMER_CONFIG)
    image = img(config)
    seen = latents if config.has_patch_embedding else mmdit.embed_image(transformer, TRANSFORMER_CONFIG, latents)
    expected = their_residuals(theirs, seen, t, context, pooled, image, 0.7)
    ours = controlnet.apply(params, config, seen, t, context, pooled, image, 0.7, implementation=implementation)
    assert len(ours) == len(expected) == config.depth
    for own, their in zip(ours, expected, strict=True):
        assert relative_error(own, their) <= 1e-5
    velocity = mmdit.apply(transformer, TRANSFORMER_CONFIG, latents, t, context, pooled, residuals=ours)
    options = {"block_controlnet_hidden_states": expected}
    their_answer = their_velocity(their_transformer, latents, t, context, pooled, **options)
    assert relative_error(velocity, their_answer) <= 1e-5
    assert relative_error(velocity, their_velocity(their_transformer, latents, t, context, pooled)) > 1e-2


def test_several_equal_diffusers_multi_controlnet():
    transformer = random_params(TRANSFORMER_CONFIG)
    configs = [JOINT, dataclasses.replace(JOINT, qk_norm=True)]
    pairs = [pair(config, seed) for seed, config in enumerate(configs)]
    multi = diffusers.SD3MultiControlNetModel([theirs for _, theirs in pairs])
    latents, t, context, pooled = random_inputs(TRANSFORMER_CONFIG)
    images, scales = [img(JOINT, 6), img(JOINT, 7)], [0.4, 1.3]
    with torch.no_grad():
        expected = multi(latents, images, scales, torch.zeros_like(pooled), context, 1000 * t, return_dict=False)[0]
    controls = [
        control.Control(params, config, image, scale)
        for (params, _), config, image, scale in zip(pairs, configs, images, scales, strict=True)
    ]
    ours = control.residuals(controls, transformer, TRANSFORMER_CONFIG, latents, t, context, pooled)
    assert not ours.after_last and len(ours.residuals) == JOINT.depth
    for own, their in zip(ours.residuals, expected, strict=True):
        assert relative_error(own, their) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_folders_are_exchanged_with_diffusers(kind, tmp_path):
    config = KINDS[kind]
    params, theirs = pair(config)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_controlnet(tmp_path / "theirs")
    assert loaded.config == config and not tree.diff(loaded.params, params)
    save_controlnet(tmp_path / "ours", loaded)
    again = diffusers.SD3ControlNetModel.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert load_controlnet(tmp_path / "ours").config == config


def test_the_released_size_has_every_tensor_of_diffusers_and_the_released_number_of_parameters():
    with torch.device("meta"):
        theirs = peers.controlnet_module(controlnet.SD35_LARGE).state_dict()
    theirs = {name: tuple(value.shape) for name, value in theirs.items()}
    spec = controlnet.spec(controlnet.SD35_LARGE)
    assert rules.keys(layouts.DIFFUSERS, spec) == theirs
    # The file of the release counts a patch embedder that nothing reads.
    unread = 16 * 4 * 2432 + 2432
    assert specs.count(spec) + unread == 2_153_677_056
