"""The IP-Adapter of SD3.5 against diffusers': resampler, attention, whole velocity, and InstantX's file."""

import dataclasses

import pytest
import torch

from bench import peers
from functional_sd3.core import spec as specs
from functional_sd3.core import tree
from functional_sd3.layouts import ip_adapter as layouts
from functional_sd3.layouts import rules
from functional_sd3.layouts.diffusers_keys import TRANSFORMER
from functional_sd3.transformer import ip_adapter, mmdit
from functional_sd3.weights import ip_adapters, load_ip_adapter, save_ip_adapter
from tests.parity.mmdit_models import (
    LAYOUTS,
    random_inputs,
    random_params,
    relative_error,
    their_velocity,
)

diffusers = pytest.importorskip("diffusers")

# Four blocks and heads of 64: diffusers' loader takes both for granted.
ADAPTER = ip_adapter.Config(
    attentions=4, width=64, head_dim=16, image_width=20, hidden_width=48, depth=4, heads=2, tokens=6, mlp_width=192,
    time_frequencies=32,
)  # fmt: skip
MODELS = {
    "SD3.5-large": (LAYOUTS["SD3.5-large"], ADAPTER),
    "SD3": (LAYOUTS["SD3"], ADAPTER),
    "SD3.5-medium": (LAYOUTS["SD3.5-medium"], dataclasses.replace(ADAPTER, attentions=6)),
}


def random_adapter(config: ip_adapter.Config) -> dict:
    generator = torch.Generator().manual_seed(4)

    def leaf(path, param):
        return 0.2 * torch.randn(param.shape, generator=generator) + (1.0 if path.endswith("norm.weight") else 0.0)

    return specs.map_params(leaf, ip_adapter.spec(config))


def theirs_of(config: mmdit.Config, params, adapter_config, adapter):
    """Their transformer with the adapter, loaded as they load InstantX's file."""
    theirs = peers.transformer_module(config)
    theirs.load_state_dict(rules.to_theirs(TRANSFORMER, mmdit.spec(config), tree.flatten_paths(params)), strict=True)
    names = rules.to_theirs(layouts.INSTANTX, ip_adapter.spec(adapter_config), tree.flatten_paths(adapter))
    state = {
        part: {name.removeprefix(part + "."): value for name, value in names.items() if name.startswith(part + ".")}
        for part in ("image_proj", "ip_adapter")
    }
    theirs._load_ip_adapter_weights(state, low_cpu_mem_usage=False)
    return theirs.eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["sdpa", "math"])
def test_the_velocity_with_an_image_prompt_equals_diffusers(name, implementation):
    config, adapter_config = MODELS[name]
    params, adapter = random_params(config), random_adapter(adapter_config)
    theirs = theirs_of(config, params, adapter_config, adapter)
    for processor in theirs.attn_processors.values():
        processor.scale = 0.7
    latents, t, context, pooled = random_inputs(config)
    features = torch.randn(3, 9, 20, generator=torch.Generator().manual_seed(5))
    expected = their_velocity(
        theirs, latents, t, context, pooled, joint_attention_kwargs={"ip_adapter_image_embeds": features}
    )
    arguments = ip_adapter.apply(adapter, adapter_config, features, t, config, 0.7, implementation=implementation)
    ours = mmdit.apply(
        params, config, latents, t, context, pooled, image_prompt=arguments, implementation=implementation
    )
    assert relative_error(ours, expected) <= 1e-5
    assert relative_error(ours, their_velocity(theirs, latents, t, context, pooled)) > 1e-2


def test_the_resampler_equals_diffusers():
    adapter = random_adapter(ADAPTER)
    config = LAYOUTS["SD3.5-large"]
    theirs = theirs_of(config, random_params(config), ADAPTER, adapter).image_proj
    features, t = torch.randn(3, 9, 20, generator=torch.Generator().manual_seed(5)), torch.tensor([0.1, 0.5, 1.0])
    with torch.no_grad():
        expected = theirs(features, 1000 * t)
    for ours, their in zip(ip_adapter.resample(adapter["resampler"], ADAPTER, features, t), expected, strict=True):
        assert relative_error(ours, their) <= 1e-5


@pytest.mark.parametrize("spelling", ["InstantX", "diffusers"])
def test_the_file_is_recognised_by_its_names_in_both_spellings(spelling, tmp_path):
    adapter = random_adapter(ADAPTER)
    path = tmp_path / "anything.safetensors"
    save_ip_adapter(path, ip_adapters.IPAdapter(adapter, ADAPTER))
    if spelling == "diffusers":
        from safetensors.torch import load_file, save_file

        config = LAYOUTS["SD3.5-large"]
        theirs = theirs_of(config, random_params(config), ADAPTER, adapter).image_proj.state_dict()
        attentions = {name: value for name, value in load_file(path).items() if name.startswith("ip_adapter.")}
        save_file({**attentions, **{f"image_proj.{name}": value.clone() for name, value in theirs.items()}}, path)
    loaded = load_ip_adapter(path)
    assert loaded.config == ADAPTER and not tree.diff(loaded.params, adapter)


def test_the_released_size_has_diffusers_shapes():
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
    from diffusers.models.embeddings import IPAdapterTimeImageProjection

    with torch.device("meta"):
        resampler = IPAdapterTimeImageProjection().state_dict()
        attention = SD3IPAdapterJointAttnProcessor2_0(2432, 2432, 64).state_dict()
    theirs = {f"image_proj.{name}": tuple(value.shape) for name, value in resampler.items()}
    for index in range(38):
        theirs |= {f"ip_adapter.{index}.{name}": tuple(value.shape) for name, value in attention.items()}
    ours = rules.keys(layouts.INSTANTX, ip_adapter.spec(ip_adapter.SD35_LARGE))
    assert {proper: theirs[name] for proper, name in rules.canonical(layouts.INSTANTX, theirs).items()} == ours
    assert layouts.infer(ours) == ip_adapter.SD35_LARGE
