"""Versions of our own files: those of before, in another order of shift and scale, are read to the same values."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from functional_sd3 import weights
from functional_sd3.core import tree
from functional_sd3.formats.notes import Note
from functional_sd3.layouts import native
from functional_sd3.training import checkpoint, digests
from functional_sd3.weights import WeightsError, metadata

SWAPPED = {
    f"transformer.{layer}.modulation.{leaf}" for layer in ("final", "blocks.2.context") for leaf in ("weight", "bias")
}
"""The leaves of which version 1 had the halves the other way round, in a transformer of three blocks."""


def swap_rows(value):
    first, second = value.chunk(2)
    return torch.cat([second, first])


def aged(path, dtype=None, version=None):
    """Rewrite a native file as version 1 wrote it."""
    mapped = weights.files.open_mapped(path)
    notes = {key: value for key, value in mapped.header.metadata.items() if key != metadata.VERSION_KEY}
    swapped = SWAPPED | {f"{name}.scale_weight".replace(".weight.scale", ".scale") for name in SWAPPED}
    tensors = {name: swap_rows(value) if name in swapped else value.clone() for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={**notes, **({metadata.VERSION_KEY: version} if version else {})})


def as_version_1(params):
    return tree.map_with_path(lambda path, leaf: swap_rows(leaf) if path in SWAPPED else leaf, params)


@pytest.mark.parametrize("version", [None, "1"])
def test_a_native_file_of_version_1_loads_to_the_same_values(make_model, tmp_path, version):
    model = make_model()
    weights.save(tmp_path / "x.safetensors", model, layout="native")
    assert weights.files.read_header(tmp_path / "x.safetensors").metadata[metadata.VERSION_KEY] == "2"
    now = {name: value.clone() for name, value in load_file(tmp_path / "x.safetensors").items()}
    aged(tmp_path / "x.safetensors", version=version)
    before = load_file(tmp_path / "x.safetensors")
    assert {name for name in now if not torch.equal(now[name], before[name])} == SWAPPED
    assert tree.diff(weights.load(tmp_path / "x.safetensors").params, model.params) == []


def test_native_shards_of_version_1_load_to_the_same_values(make_model, tmp_path):
    model = make_model()
    weights.save(tmp_path / "x", model, layout="native", shard_bytes=20_000)
    shards = list((tmp_path / "x").rglob("*.safetensors"))
    assert len(shards) > 2
    for path in shards:
        aged(path)
    assert tree.diff(weights.load(tmp_path / "x").params, model.params) == []


def test_quantized_weights_of_version_1_load_to_the_same_values_and_scales(make_model, tmp_path):
    model = make_model()
    stored = {**model.params, "transformer": weights.quantize.quantize(model.params["transformer"])}
    weights.save(tmp_path / "x.safetensors", model._replace(params=stored), layout="native")
    aged(tmp_path / "x.safetensors")
    assert "transformer.blocks.2.context.modulation.scale_weight" in load_file(tmp_path / "x.safetensors")
    assert tree.diff(weights.load(tmp_path / "x.safetensors", quantized=True).params, stored) == []
    floats = {**stored, "transformer": weights.quantize.dequantize(stored["transformer"])}
    assert tree.diff(weights.load(tmp_path / "x.safetensors").params, floats) == []


@pytest.mark.parametrize("notes", [None, {"format": "pt"}])
def test_a_tree_that_another_program_wrote_is_read_as_it_is_with_a_note(make_model, tmp_path, notes):
    model = make_model()
    leaves = tree.flatten_paths(model.params)
    save_file({name: leaf.contiguous() for name, leaf in leaves.items()}, tmp_path / "x.safetensors", metadata=notes)
    with pytest.warns(Note, match="does not say the version of its names.*version 2, shift before scale"):
        loaded = weights.load(tmp_path / "x.safetensors")
    assert tree.diff(loaded.params, model.params) == []
    # Versions differ in the transformer alone.
    weights.load(tmp_path / "x.safetensors", only=("vae", "t5"))


@pytest.mark.parametrize("key, text", [(metadata.VERSION_KEY, None), (metadata.VERSION_KEY, "3"), (metadata.KEY, "{}")])
def test_shards_that_are_not_of_one_model_are_refused(make_model, tmp_path, key, text):
    weights.save(tmp_path / "x", make_model(), layout="native", shard_bytes=20_000)
    last = max((tmp_path / "x").rglob("*.safetensors"))
    notes = dict(weights.files.read_header(last).metadata)
    notes.pop(key)
    save_file(load_file(last), last, metadata={**notes, **({key: text} if text else {})})
    with pytest.raises(WeightsError, match=f"shards are not those of one model: .*differ in their metadata {key}$"):
        weights.load(tmp_path / "x")


def test_a_version_that_is_not_known_is_refused(make_model, tmp_path):
    weights.save(tmp_path / "x.safetensors", make_model(), layout="native")
    aged(tmp_path / "x.safetensors", version="3")
    with pytest.raises(WeightsError, match="functional_sd3_version is '3'.*up to 2: a newer one wrote it"):
        weights.load(tmp_path / "x.safetensors")


def test_the_version_says_nothing_of_files_under_other_names(make_model, tmp_path):
    model = make_model()
    weights.save(tmp_path / "x.safetensors", model, layout="single")
    tensors = load_file(tmp_path / "x.safetensors")
    notes = dict(weights.files.read_header(tmp_path / "x.safetensors").metadata)
    for version in ("1", "2"):
        save_file(tensors, tmp_path / "y.safetensors", metadata={**notes, metadata.VERSION_KEY: version})
        assert tree.diff(weights.load(tmp_path / "y.safetensors").params, model.params) == []


def test_a_checkpoint_of_version_1_resumes_with_the_same_state(make_model, tmp_path):
    params = {"transformer": make_model().params["transformer"]}
    state = {"params": params, "optimizer": [{"mean": tree.map(lambda leaf: 2 * leaf, params)}]}
    path = checkpoint.save(tmp_path, 3, state, {"lr": 1})
    assert tree.diff(checkpoint.load(path, state), state) == []
    old = {"params": as_version_1(params), "optimizer": [{"mean": as_version_1(state["optimizer"][0]["mean"])}]}
    save_file(tree.flatten_paths(old), path, metadata={"settings": json.dumps({"lr": 1})})
    assert tree.diff(checkpoint.load(path, state), state) == []


def test_digests_of_a_model_are_those_of_version_1(make_model):
    params = make_model().params
    expected = {f"the {name} of the model": digests.params_digest(one) for name, one in as_version_1(params).items()}
    assert digests.model_digests(params) == expected
    assert native.swapped_in_version_1(tree.flatten_paths(params)) == SWAPPED
