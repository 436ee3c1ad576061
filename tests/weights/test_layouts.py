"""Every layout against every other: the same trees, bit for bit, and configs read off the shapes alone."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from functional_sd3 import weights
from functional_sd3.image.taesd import TAESD3
from functional_sd3.image.vae import SD3_VAE
from functional_sd3.layouts import registry, rules
from functional_sd3.text.clip import CLIP_G, CLIP_L
from functional_sd3.text.t5 import T5_XXL
from functional_sd3.transformer.mmdit import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from functional_sd3.weights import SPECS, WeightsError, metadata
from tests.weights.strategies import DTYPES, configs

RELEASED = {
    "SD3 medium": ("transformer", SD3_MEDIUM, 491, 683),
    "SD3.5 medium": ("transformer", SD35_MEDIUM, 665, 909),
    "SD3.5 large": ("transformer", SD35_LARGE, 923, 1227),
    "VAE": ("vae", SD3_VAE, 244, 244),
    "CLIP-L": ("clip_l", CLIP_L, 197, 197),
    "CLIP-G": ("clip_g", CLIP_G, 517, 517),
    "T5-XXL": ("t5", T5_XXL, 219, 219),
    "TAESD3": ("taesd", TAESD3, 134, 134),
}
PLACES = (
    ("diffusers", "folder"),
    ("stability", "file.safetensors"),
    ("stability", "folder"),
    ("single", "all-in-one"),
    ("native", "file.safetensors"),
    ("native", "folder"),
)


def names_and_shapes(table, name):
    component, config, *_ = RELEASED[name]
    return rules.keys(table[component].layout(config), SPECS[component](config))


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_models_have_their_published_numbers_of_keys_in_both_layouts(name):
    counts = [len(names_and_shapes(table, name)) for table in (registry.STABILITY, registry.DIFFUSERS)]
    assert counts == list(RELEASED[name][2:])


@pytest.mark.parametrize(
    "table", [registry.STABILITY, registry.DIFFUSERS, registry.NATIVE], ids=["stability", "diffusers", "native"]
)
@pytest.mark.parametrize("name", RELEASED)
def test_the_released_architectures_are_read_off_their_shapes(name, table):
    component, config, *_ = RELEASED[name]
    assert weights.infer_config(names_and_shapes(table, name)) == weights.Config(**{component: config})


def test_all_components_are_read_off_one_checkpoint():
    whole = {}
    for name in ("SD3.5 medium", "VAE", "CLIP-L", "CLIP-G", "T5-XXL"):
        whole |= names_and_shapes(registry.STABILITY, name)
    expected = weights.Config(clip_l=CLIP_L, clip_g=CLIP_G, t5=T5_XXL, transformer=SD35_MEDIUM, vae=SD3_VAE)
    assert weights.infer_config({**whole, "text_encoders.clip_l.logit_scale": ()}) == expected


@settings(max_examples=12)
@given(configs(), st.sampled_from(DTYPES), st.permutations(PLACES), st.integers(0, 99))
def test_a_tree_goes_through_every_layout_and_comes_back_bit_for_bit(
    make_model, same, tmp_path_factory, config, dtype, places, seed
):
    config = replace(config, vae=config.vae or SMALL_VAE)
    first = model = make_model(config, seed, dtype)
    root = tmp_path_factory.mktemp("trip")
    for index, (kind, name) in enumerate(places):
        (root / str(index)).mkdir()
        path = root / str(index) / name
        weights.save(path, model, layout=kind)
        model = weights.load(path, dtype="stored")
        assert model.config == config
        assert same(model.params, first.params)


SMALL_VAE = replace(SD3_VAE, channels=(2, 4), groups=2, blocks_per_level=1)


def without_note(path):
    """Leave out all metadata but the version, without which a native file gets a Note (test_versions)."""
    save_file(load_file(path), path, metadata={metadata.VERSION_KEY: "2"})


@settings(max_examples=30)
@given(configs(), st.sampled_from(["single", "native"]), st.integers(0, 99))
def test_without_a_note_the_tensors_alone_give_the_same_tree(make_model, same, tmp_path_factory, config, kind, seed):
    config = replace(config, vae=config.vae or SMALL_VAE)
    model = make_model(config, seed)
    path = tmp_path_factory.mktemp("bare") / "x.safetensors"
    weights.save(path, model, layout=kind)
    without_note(path)
    found = weights.load(path)
    assert same(found.params, model.params)
    for name in ("transformer", "t5", "taesd", "vae"):
        ours, theirs = getattr(config, name), getattr(found.config, name)
        if ours is not None:
            unsaid = {
                "transformer": {"sample_size": 128},
                "vae": {
                    "groups": theirs.groups if name == "vae" else 0,
                    "scaling": SD3_VAE.scaling,
                    "shift": SD3_VAE.shift,
                    "sample_size": 1024,
                },
            }.get(name, {})
            if name == "transformer" and not ours.qk_norm:
                unsaid |= {"heads": theirs.heads, "head_dim": theirs.head_dim}
            assert theirs == replace(ours, **unsaid)


def test_a_config_and_its_parameters_are_saved_as_the_model_of_both(make_model, tmp_path):
    model = make_model()
    for kind in weights.LAYOUTS:
        name = "x.safetensors" if kind != "diffusers" else "x"
        weights.save(tmp_path / f"1{name}", model, layout=kind, dtype=torch.float16)
        weights.save(tmp_path / f"2{name}", model.params, model.config, layout=kind, dtype=torch.float16)
        first, second = (sorted(path for path in [one, *one.rglob("*")] if path.is_file())
                         for one in (tmp_path / f"1{name}", tmp_path / f"2{name}"))  # fmt: skip
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second] != []
    for wrong in ((model.config,), (model, model.params), (model.params, model.params)):
        with pytest.raises(TypeError, match="save takes a weights.Model, or the parameters by component and"):
            weights.save(tmp_path / "y", *wrong)


def test_diffusers_has_scale_before_shift_in_the_last_context_and_the_final_layer(make_model, tmp_path):
    model = make_model()
    weights.save(tmp_path / "x", model)
    (path,) = (tmp_path / "x" / "transformer").glob("*.safetensors")
    theirs, ours = load_file(path), model.params["transformer"]
    contexts = [block["context"]["modulation"] for block in ours["blocks"]]
    for leaf in ("weight", "bias"):
        last, final = contexts[2][leaf], ours["final"]["modulation"][leaf]
        assert torch.equal(theirs[f"transformer_blocks.2.norm1_context.linear.{leaf}"], last.roll(16, 0))
        assert torch.equal(theirs[f"norm_out.linear.{leaf}"], final.roll(16, 0))
        assert torch.equal(theirs[f"transformer_blocks.1.norm1_context.linear.{leaf}"], contexts[1][leaf])


def test_stability_keeps_shift_before_scale_in_the_last_context_and_the_final_layer(make_model, tmp_path):
    model = make_model()
    weights.save(tmp_path / "x.safetensors", model, layout="stability")
    theirs, ours = load_file(tmp_path / "x.safetensors"), model.params["transformer"]
    prefix = "model.diffusion_model."
    for name, leaf in {
        "joint_blocks.2.context_block.adaLN_modulation.1.bias": ours["blocks"][2]["context"]["modulation"]["bias"],
        "final_layer.adaLN_modulation.1.bias": ours["final"]["modulation"]["bias"],
    }.items():
        assert torch.equal(theirs[prefix + name], leaf)
    assert torch.equal(
        theirs[prefix + "joint_blocks.1.context_block.adaLN_modulation.1.bias"],
        ours["blocks"][1]["context"]["modulation"]["bias"],
    )
    smallest = theirs["first_stage_model.decoder.up.0.block.0.conv1.weight"]
    assert torch.equal(smallest, model.params["vae"]["decoder"]["levels"][-1]["blocks"][0]["conv1"]["weight"])


def test_a_folder_of_stability_has_a_file_for_each_encoder_that_stands_alone(make_model, same, tmp_path):
    model = make_model()
    weights.save(tmp_path / "models", model, layout="stability")
    names = ["clip_g.safetensors", "clip_l.safetensors", "sd3.safetensors", "t5xxl.safetensors"]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == names
    for path in (tmp_path / "models").iterdir():
        without_note(path)
    t5 = load_file(tmp_path / "models" / "t5xxl.safetensors")
    assert torch.equal(t5["shared.weight"], t5["encoder.embed_tokens.weight"])
    assert same(weights.load(tmp_path / "models").params, model.params)
    several = [tmp_path / "models" / name for name in names]
    assert same(weights.load(several).params, model.params)
    assert list(weights.load(several[0]).params) == ["clip_l"]
    assert list(weights.load(several[:2], only="clip_g").params) == ["clip_g"]


def test_what_shapes_cannot_be_read_without_is_named():
    shapes = names_and_shapes(registry.STABILITY, "SD3 medium")
    key = "model.diffusion_model.context_embedder.weight"
    lacking = {name: shape for name, shape in shapes.items() if name != key}
    with pytest.raises(WeightsError, match=f"{key} is missing, and the sizes of the model cannot be read"):
        weights.infer_config(lacking)
    with pytest.raises(WeightsError, match=rf"{key} has shape \[7\], and the sizes"):
        weights.infer_config({**shapes, key: (7,)})


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "controlnet_blocks.0.weight": "is a ControlNet",
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "is a LoRA",
        "double_blocks.0.img_attn.qkv.weight": "is a Flux model",
        "model.diffusion_model.input_blocks.0.0.weight": "is a U-Net",
        "something.else": "is nothing known of SD3: 1 tensors such as something.else",
    }.items(),
)
def test_what_is_no_component_is_said(name, said):
    with pytest.raises(WeightsError, match=said):
        weights.infer_config({name: (1,)})


def test_a_note_that_contradicts_the_tensors_or_cannot_be_read_is_an_error(make_model, tmp_path):
    path = tmp_path / "x.safetensors"
    weights.save(path, make_model(), layout="single")
    tensors = load_file(path)
    said = json.loads(metadata.write(make_model().config, ("transformer", "vae"))[metadata.KEY])
    said["transformer"]["joint_attention_dim"] = 47
    save_file(tensors, path, metadata={metadata.KEY: json.dumps(said)})
    with pytest.raises(WeightsError, match=r"context_embedder.weight has shape \[16, 48\], expected \[16, 47\]"):
        weights.load(path)
    for note in ("{", "[]", '{"vae": 3}', '{"vae": {}, "vae": {}}'):
        save_file(tensors, path, metadata={metadata.KEY: note})
        with pytest.raises(WeightsError, match="its metadata functional_sd3: "):
            weights.load(path)


def test_folders_of_folders_are_read_as_other_programs_keep_them(make_model, same, tmp_path):
    model = make_model()
    weights.save(tmp_path / "flat", model, layout="stability")
    places = {"sd3": "checkpoints", "clip_l": "text_encoders", "clip_g": "clip", "t5xxl": "text_encoders"}
    for name, room in places.items():
        (tmp_path / "models" / room).mkdir(parents=True, exist_ok=True)
        (tmp_path / "flat" / f"{name}.safetensors").rename(tmp_path / "models" / room / f"{name}.safetensors")
    (tmp_path / "models" / "vae").mkdir()
    (tmp_path / "models" / "checkpoints" / "put_checkpoints_here").touch()
    # What goes with a model is no part of it, and no folder is entered from within itself.
    (tmp_path / "models" / "loras").mkdir()
    (tmp_path / "models" / "loras" / "broken.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "models" / "vae" / "vae").symlink_to("..")
    loaded = weights.load(tmp_path / "models")
    assert same(loaded.params, model.params)
    weights.save(tmp_path / "without an index", model)
    (tmp_path / "without an index" / "model_index.json").unlink()
    assert same(weights.load(tmp_path / "without an index").params, model.params)
    (tmp_path / "models" / "clip" / "broken.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(WeightsError, match="clip/broken.safetensors: is a text file"):
        weights.load(tmp_path / "models")


def test_results_are_params_then_config(make_model, tmp_path):
    model = make_model()
    weights.save(tmp_path / "whole", model)
    weights.save(tmp_path / "two", model.config, model.params)
    for name in ("whole", "two"):
        params, config, tokenizers = weights.load(tmp_path / name)
        assert params.keys() == model.params.keys() and config == model.config
    with pytest.raises(TypeError, match="is .params, config, tokenizers."):
        weights.save(tmp_path / "swapped", weights.Model(model.config, model.params))
    with pytest.raises(TypeError, match="not dict and dict"):
        weights.save(tmp_path / "two", model.params, model.params)
