"""Sketches of components: alike in every layout and dtype, and other for another model."""

import pytest
import torch

from functional_sd3 import weights
from functional_sd3.core import tree
from functional_sd3.weights import sketch

COMPONENTS = ("clip_l", "clip_g", "t5", "transformer", "vae")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sketches") / "diffusers"
    weights.save(folder, model)
    return folder


@pytest.mark.parametrize("layout", ["native", "stability", "single"])
def test_a_sketch_does_not_depend_on_the_layout(model, saved, tmp_path, layout):
    path = tmp_path / ("all.safetensors" if layout == "single" else "all")
    weights.save(path, model, layout=layout)
    assert sketch.sketch([path], only=COMPONENTS) == sketch.sketch([saved], only=COMPONENTS)
    assert set(sketch.sketch([path], only=("vae", "t5"))) == {"vae", "t5"}


def test_a_sketch_does_not_depend_on_a_dtype_that_holds_the_values(model, tmp_path):
    half = model._replace(params={name: tree.cast(params, torch.bfloat16) for name, params in model.params.items()})
    weights.save(tmp_path / "half", half)
    weights.save(tmp_path / "wide", half, dtype=torch.float32)
    sketches = [sketch.sketch([tmp_path / name], only=COMPONENTS) for name in ("half", "wide")]
    assert sketches[0] == sketches[1]


@pytest.mark.parametrize("name", COMPONENTS)
def test_one_matrix_that_changed_changes_the_sketch_of_its_component_alone(model, saved, tmp_path, name):
    path = max(path for path, leaf in tree.flatten_paths(model.params[name]).items() if leaf.ndim == 2)
    changed = tree.map_with_path(lambda at, leaf: leaf * 1.01 if at == path else leaf, model.params[name])
    weights.save(tmp_path / "other", model._replace(params={**model.params, name: changed}))
    before, after = (sketch.sketch([place], only=COMPONENTS) for place in (saved, tmp_path / "other"))
    assert {each for each in COMPONENTS if before[each] != after[each]} == {name}


def test_a_sketch_reads_no_whole_tensor(saved, monkeypatch):
    """So that it takes milliseconds for gigabytes."""
    joined = []
    original = sketch.trees.sources.FUSE.join
    monkeypatch.setattr(torch, "cat", lambda *parts: joined.append(parts) or original(*parts))
    sketch.sketch([saved], only=("clip_l", "t5"))
    assert not joined
