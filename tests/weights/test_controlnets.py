"""ControlNets on disk: both layouts round trip, a config is read off shapes, and bad files say what is wrong."""

import dataclasses
import json

import pytest
import torch

from functional_sd3.core import prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.formats import files
from functional_sd3.transformer import controlnet
from functional_sd3.weights import WeightsError, controlnets, load, load_controlnet, save_controlnet

JOINT = controlnet.Config(
    depth=3, heads=2, head_dim=16, context_width=12, pooled_width=10, position_size=9, extra_channels=1, qk_norm=True,
    dual_attention_layers=(0, 2), kind="pose",
)  # fmt: skip
STABILITYS = controlnet.Config(
    depth=2, heads=1, context_width=None, pooled_width=10, has_patch_embedding=False, position_size=None,
    zero_pooled=False, kind="canny",
)  # fmt: skip


def random_net(config: controlnet.Config) -> controlnets.ControlNet:
    generator = torch.Generator().manual_seed(0)

    def leaf(path, param):
        if not param.trainable:
            return param.init(prng.key(0), param.shape)
        return torch.randn(param.shape, generator=generator)

    return controlnets.ControlNet(specs.map_params(leaf, controlnet.spec(config)), config)


@pytest.mark.parametrize("config", [JOINT, STABILITYS, dataclasses.replace(JOINT, position_size=None, kind=None)])
def test_the_folder_of_diffusers_round_trips(config, tmp_path):
    net = random_net(config)
    save_controlnet(tmp_path / "net", net)
    loaded = load_controlnet(tmp_path / "net")
    assert loaded.config == config and not tree.diff(loaded.params, net.params)
    half = load_controlnet(tmp_path / "net", dtype=torch.bfloat16)
    assert all(leaf.dtype == torch.bfloat16 for leaf in tree.leaves(half.params))


@pytest.mark.parametrize("kind", ["blur", "canny", "depth", None])
def test_the_file_of_stability_round_trips_with_its_kind(kind, tmp_path):
    net = random_net(dataclasses.replace(STABILITYS, kind=kind))
    save_controlnet(tmp_path / "net.safetensors", net, layout="stability")
    loaded = load_controlnet(tmp_path / "net.safetensors")
    assert loaded.config == net.config and not tree.diff(loaded.params, net.params)


def test_the_file_of_stability_has_the_names_its_reference_reads(tmp_path):
    save_controlnet(tmp_path / "net.safetensors", random_net(STABILITYS), layout="stability")
    names = set(files.shapes(tmp_path / "net.safetensors"))
    block = ("adaLN_modulation.1", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"transformer_blocks.{i}.{part}" for i in range(2) for part in block}
    expected |= {f"controlnet_blocks.{i}" for i in range(2)} | {"pos_embed_input.proj"}
    embedders = ("timestep_embedder", "text_embedder")
    expected |= {f"time_text_embed.{one}.linear_{i}" for one in embedders for i in (1, 2)}
    assert names == {f"{name}.{leaf}" for name in expected for leaf in ("weight", "bias")} | {"control_type"}


def test_what_the_released_files_have_over_is_not_read(tmp_path):
    net = random_net(STABILITYS)
    path = tmp_path / "net.safetensors"
    save_controlnet(path, net, layout="stability")
    mapped = files.open_mapped(path)
    kept = {name: files.tensor(mapped, name).clone() for name in mapped.header.tensors}
    over = {"pos_embed.proj.weight": torch.zeros(64, 16, 2, 2), "context_embedder.weight": torch.zeros(64, 12)}
    files.write_atomic(path, {**kept, **over})
    loaded = load_controlnet(path)
    assert loaded.config == net.config and not tree.diff(loaded.params, net.params)


@pytest.mark.parametrize("config", [JOINT, STABILITYS, dataclasses.replace(JOINT, dual_attention_layers=(1,))])
def test_a_config_is_read_off_the_shapes(config, tmp_path):
    net = random_net(dataclasses.replace(config, kind=None))
    save_controlnet(tmp_path / "net", net)
    loaded = load_controlnet(tmp_path / "net" / "diffusion_pytorch_model.safetensors")
    assert loaded.config == net.config and not tree.diff(loaded.params, net.params)


def test_the_released_config_is_read_off_the_shapes():
    from functional_sd3.layouts import controlnet as layouts
    from functional_sd3.layouts import rules

    assert layouts.infer(rules.keys(layouts.STABILITY, controlnet.spec(controlnet.SD35_LARGE))) == (
        controlnet.SD35_LARGE
    )


def test_a_file_of_the_kind_whose_blocks_all_read_the_same_is_refused_by_name(tmp_path):
    # Its pooled text comes out of the transformer's embedder, so it is as wide as the blocks.
    net = random_net(dataclasses.replace(STABILITYS, pooled_width=64))
    save_controlnet(tmp_path / "x.safetensors", net, layout="stability")
    with pytest.raises(WeightsError, match="of the kind that Stability's reference calls 2b, .* is not computed here"):
        load_controlnet(tmp_path / "x.safetensors")


def test_a_controlnet_is_no_component_of_a_model_and_says_who_reads_it(tmp_path):
    save_controlnet(tmp_path / "net", random_net(JOINT))
    save_controlnet(tmp_path / "net.safetensors", random_net(STABILITYS), layout="stability")
    for path in (tmp_path / "net", tmp_path / "net.safetensors"):
        with pytest.raises(WeightsError, match=f"{path}: is a ControlNet, which weights.load_controlnet reads"):
            load(path)


def test_a_folder_of_something_else_is_named_with_its_option(tmp_path):
    for name, option in (("learned_embeds.safetensors", "--embedding"), ("adapter_model.safetensors", "--lora"),
                         ("model_index.json", "--params")):  # fmt: skip
        (tmp_path / name).touch()
        with pytest.raises(WeightsError, match=rf"without config.json of a ControlNet: it holds a.* \({option}\)"):
            load_controlnet(tmp_path)


def test_values_that_are_not_finite_are_named_unless_they_are_asked_for(tmp_path):
    net = random_net(JOINT)
    net.params["residuals"][0]["bias"][1] = torch.nan
    save_controlnet(tmp_path, net)
    with pytest.raises(WeightsError, match=r"controlnet_blocks.0.bias holds NaN; finite=False loads it all the same"):
        load_controlnet(tmp_path)
    assert load_controlnet(tmp_path, finite=False).params["residuals"][0]["bias"][1].isnan()


def test_a_file_of_something_else_is_no_controlnet(tmp_path):
    files.write_atomic(tmp_path / "x.safetensors", {"pos_embed.proj.weight": torch.zeros(4, 4)})
    with pytest.raises(WeightsError, match="controlnet_blocks.0.weight is missing: this is not a ControlNet of SD3"):
        load_controlnet(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_class_name": "FluxControlNetModel"}, "only 'SD3ControlNetModel' is supported"),
        ({"pos_embed_type": "rope"}, "pos_embed_type is 'rope'"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size is None"),
        ({"num_layers": 2}, r"dual_attention_layers \[0, 2\] must all be below num_layers 2"),
        ({"num_layers": 4}, "controlnet_blocks.3.weight is missing"),
        ({"num_attention_heads": 3}, r"has shape \[32"),
        ({"joint_attention_dim": None}, "context_embedder.weight is unexpected"),
        ({"window": 3}, "window is 3, a field that is not known"),
        ({"_control_type": "cany"}, "_control_type is 'cany', must be 'blur'"),
    ],
)
def test_folders_we_do_not_compute_are_refused(change, message, tmp_path):
    save_controlnet(tmp_path, random_net(JOINT))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(WeightsError, match=message):
        load_controlnet(tmp_path)


@pytest.mark.parametrize("value", [3, -1])
def test_a_control_type_nobody_knows_is_refused(value, tmp_path):
    path = tmp_path / "net.safetensors"
    save_controlnet(path, random_net(STABILITYS), layout="stability")
    mapped = files.open_mapped(path)
    kept = {name: files.tensor(mapped, name).clone() for name in mapped.header.tensors}
    files.write_atomic(path, {**kept, "control_type": torch.tensor([value], dtype=torch.int32)})
    with pytest.raises(WeightsError, match=r"control_type is \[.*\], must be 0 \(blur\)"):
        load_controlnet(path)


@pytest.mark.parametrize(
    "config, options, message",
    [
        (JOINT, {"layout": "stability"}, "hold ControlNets of the image alone"),
        (dataclasses.replace(STABILITYS, kind="pose"), {"layout": "stability"}, "know the kinds blur, canny, depth"),
        (JOINT, {"layout": "comfy"}, "layout 'comfy' of a ControlNet must be one of diffusers, stability"),
    ],
)
def test_what_a_layout_cannot_hold_is_said(config, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_controlnet(tmp_path / "net", random_net(config), **options)
    assert not (tmp_path / "net").exists()


def test_parameters_that_do_not_fit_are_not_saved(tmp_path):
    net = random_net(STABILITYS)
    params = {name: part for name, part in net.params.items() if name != "control_patch"}
    with pytest.raises(WeightsError, match="control_patch.weight is missing"):
        save_controlnet(tmp_path / "net", net._replace(params=params))
    assert not (tmp_path / "net").exists()
