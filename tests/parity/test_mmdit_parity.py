"""The MMDiT against diffusers' SD3Transformer2DModel, with random weights everywhere (modulations included)."""

import pytest
import torch

from bench import peers
from functional_sd3.core import prng, tree
from functional_sd3.layouts import rules
from functional_sd3.layouts.diffusers_keys import TRANSFORMER
from functional_sd3.transformer import mmdit
from tests.parity.mmdit_models import LAYOUTS, random_inputs, random_params, relative_error, their_velocity

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module", params=LAYOUTS)
def case(request):
    config = LAYOUTS[request.param]
    params = random_params(config)
    theirs = peers.transformer_module(config)
    theirs.load_state_dict(rules.to_theirs(TRANSFORMER, mmdit.spec(config), tree.flatten_paths(params)), strict=True)
    return config, params, theirs


@pytest.mark.parametrize("height, width, tokens", [(20, 28, 7), (48, 4, 1), (2, 2, 33)])
@pytest.mark.parametrize("implementation", ["sdpa", "math"])
def test_velocity_equals_diffusers(case, height, width, tokens, implementation):
    config, params, theirs = case
    inputs = random_inputs(config, height=height, width=width, tokens=tokens)
    ours = mmdit.apply(params, config, *inputs, implementation=implementation)
    assert relative_error(ours, their_velocity(theirs, *inputs)) <= 1e-5


@pytest.mark.parametrize("skipped", [(1,), (0, 2), (3,)])
def test_skipped_layers_equal_diffusers(case, skipped):
    config, params, theirs = case
    inputs = random_inputs(config)
    ours = mmdit.apply(params, config, *inputs, skip_layers=skipped)
    assert relative_error(ours, their_velocity(theirs, *inputs, skip_layers=list(skipped))) <= 1e-5


@pytest.mark.parametrize("count, skipped", [(1, ()), (2, ()), (3, (1,)), (4, (3,))])
def test_residuals_are_added_where_diffusers_adds_them(case, count, skipped):
    config, params, theirs = case
    inputs = random_inputs(config)
    residuals = list(torch.randn(count, 3, 140, config.width, generator=torch.Generator().manual_seed(2)))
    ours = mmdit.apply(params, config, *inputs, residuals=residuals, skip_layers=skipped)
    options = {"block_controlnet_hidden_states": residuals, "skip_layers": list(skipped)}
    assert relative_error(ours, their_velocity(theirs, *inputs, **options)) <= 1e-5


def test_modulations_computed_ahead_equal_diffusers(case):
    config, params, theirs = case
    latents, t, context, pooled = random_inputs(config)
    modulations = mmdit.at(mmdit.modulations(params, config, torch.stack([t, t.flip(0)]), pooled), 1)
    ours = mmdit.apply(params, config, latents, None, context, None, modulations=modulations)
    assert relative_error(ours, their_velocity(theirs, latents, t.flip(0), context, pooled)) <= 1e-5


def test_bfloat16_is_as_close_to_float32_as_that_of_diffusers(case):
    config, params, theirs = case
    inputs = random_inputs(config)
    exact = their_velocity(theirs, *inputs)
    ours = mmdit.apply(tree.cast(params, torch.bfloat16), config, *inputs)
    assert relative_error(ours, exact) <= 2e-2


@pytest.mark.parametrize("size", [5, 24, 192])
@pytest.mark.parametrize("sample_size", [32, 128])
def test_the_position_table_is_diffusers_buffer_bit_for_bit(size, sample_size):
    config = mmdit.Config(depth=1, heads=1, position_size=size, sample_size=sample_size)
    position = mmdit.spec(config)["position"]
    assert torch.equal(position.init(prng.key(0), position.shape), peers.transformer_module(config).pos_embed.pos_embed)


@pytest.mark.parametrize(
    "config, tensors", [(mmdit.SD3_MEDIUM, 683), (mmdit.SD35_MEDIUM, 909), (mmdit.SD35_LARGE, 1227)]
)
def test_presets_have_every_tensor_of_diffusers(config, tensors):
    with torch.device("meta"):
        theirs = {name: tuple(tensor.shape) for name, tensor in peers.transformer_module(config).state_dict().items()}
    assert rules.keys(TRANSFORMER, mmdit.spec(config)) == theirs
    assert len(theirs) == tensors
