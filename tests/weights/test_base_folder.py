"""Folders that refer to another for what they lack: loaded as one model, saved so, and everything wrong with them."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from functional_sd3 import weights
from functional_sd3.core import tree
from functional_sd3.flow import schedule
from functional_sd3.weights import Tokenizers, WeightsError, shipped


@pytest.fixture(scope="module")
def models(make_model):
    """A whole model, and another transformer of its sizes with a schedule of its own."""
    whole = make_model()
    student = {"transformer": tree.map(lambda leaf: leaf + 1, whole.params["transformer"])}
    levels = schedule.Config(shift=3.0, distilled_steps=4, distillation="segments", guidance_distilled=True)
    return whole, student, levels


@pytest.fixture
def folders(models, tmp_path):
    """The whole model in `whole`, the transformer alone in `student`."""
    whole, student, levels = models
    weights.save(tmp_path / "whole", whole)
    weights.save(tmp_path / "student", student, replace(whole.config, schedule=levels), base="../whole")
    return tmp_path / "whole", tmp_path / "student"


def set_base(folder, value):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_base_model": value}))


def problems_of(*paths, **options):
    with pytest.raises(WeightsError) as caught:
        weights.load(list(paths), **options)
    return caught.value.problems


def test_what_the_folder_lacks_is_read_in_the_other(models, folders, same):
    (whole, student, levels), (_, folder) = models, folders
    assert sorted(entry.name for entry in folder.iterdir()) == ["model_index.json", "scheduler", "transformer"]
    model = weights.load(folder, dtype="stored")
    assert same(model.params, {**whole.params, **student})
    assert model.config.schedule == levels
    assert weights.outline(folder).config == model.config


def test_tokenizers_come_along(tmp_path):
    model = weights.load(shipped.folder(), dtype="stored")
    weights.save(tmp_path / "tiny", model)
    student = model._replace(params={"transformer": model.params["transformer"]}, tokenizers=Tokenizers())
    weights.save(tmp_path / "student", student, base="../tiny")
    loaded = weights.load(tmp_path / "student", dtype="stored")
    assert loaded.tokenizers == model.tokenizers and not weights.missing(loaded)
    (only,) = weights.load(tmp_path / "student", only="transformer").params
    assert only == "transformer"


def test_the_schedule_is_that_of_the_other_where_the_folder_has_none(models, folders):
    whole, folder = folders
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scheduler": [None, None]}))
    assert weights.load(folder).config.schedule == models[0].config.schedule


def test_the_other_folder_is_read_for_what_is_missing_alone(folders):
    whole, folder = folders
    (whole / "transformer" / "config.json").write_text("{")
    assert "vae" in weights.load(folder).params
    shutil.rmtree(whole)
    assert list(weights.load(folder, only="transformer").params) == ["transformer"]


def test_a_missing_folder_is_named_with_what_it_should_hold(folders):
    whole, folder = folders
    shutil.rmtree(whole)
    (problem,) = problems_of(folder)
    assert f"{folder}/model_index.json: _base_model is '../whole', but {whole} is no model folder" in problem
    assert "clip_l" in problem and "vae" in problem and "transformer" not in problem


def test_a_whole_model_needs_no_other(tmp_path, same):
    shipped_model = weights.load(shipped.folder(), dtype="stored")
    weights.save(tmp_path / "whole", shipped_model)
    set_base(tmp_path / "whole", "../gone")
    model = weights.load(tmp_path / "whole", dtype="stored")
    assert same(model.params, shipped_model.params) and model.config.taesd is None
    (problem,) = problems_of(tmp_path / "whole", only="taesd")
    assert "'../gone'" in problem and "with taesd" in problem


def test_a_fault_of_the_other_folder_is_named(folders):
    whole, folder = folders
    (whole / "vae" / "config.json").unlink()
    (problem,) = problems_of(folder)
    assert str(whole / "vae" / "config.json") in problem


def test_chains_and_circles_are_refused(folders):
    whole, folder = folders
    set_base(whole, "../student")
    (problem,) = problems_of(folder)
    assert "which refers to yet another" in problem
    set_base(folder, ".")
    assert any("which refers to yet another" in problem for problem in problems_of(folder))


@pytest.mark.parametrize("value", ["", 3, ["../whole"], "/models/whole", "C:/whole", "..\\whole", "a\0b"])
def test_a_reference_is_a_relative_path(folders, value):
    set_base(folders[1], value)
    (problem,) = problems_of(folders[1])
    assert "_base_model" in problem and "relative to this" in problem
    model = weights.load(folders[0])
    with pytest.raises(ValueError, match="base .* must be"):
        weights.save(folders[1], model, base=value)


def test_a_folder_behind_a_link_refers_from_where_it_is(models, folders, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(folders[1])
    assert set(weights.load(tmp_path / "elsewhere" / "link").params) == set(models[0].params)


def test_other_paths_go_with_it(models, folders, tmp_path, same):
    """As with every model, a component that is there twice is refused."""
    weights.save(tmp_path / "own", models[0]._replace(params={"vae": models[0].params["vae"]}, tokenizers=Tokenizers()))
    assert any("vae is in" in problem for problem in problems_of(folders[1], tmp_path / "own"))


def test_saving_names_a_folder_that_is_no_model(models, tmp_path):
    with pytest.raises(WeightsError, match="is no model's folder"):
        weights.save(tmp_path / "student", models[0], base="../whole")
    assert not (tmp_path / "student").exists()


def test_only_folders_of_diffusers_layout_refer(models, folders):
    with pytest.raises(ValueError, match="only layout 'diffusers'"):
        weights.save(folders[0].parent / "x.safetensors", models[0], layout="single", base="whole")


def test_a_whole_model_is_saved_from_both(folders, tmp_path, same):
    model = weights.load(folders[1], dtype="stored")
    weights.save(tmp_path / "copy", model)
    shutil.rmtree(folders[0])
    assert same(weights.load(tmp_path / "copy", dtype="stored").params, model.params)


def test_a_description_says_where_each_part_is(folders):
    description = weights.describe(folders[1])
    where = {part.component: part.where for part in description.parts}
    assert where["transformer"] == str(folders[1] / "transformer") and where["vae"] == str(folders[0] / "vae")
    assert description.missing == weights.missing(weights.load(folders[1]))


def test_the_other_folder_may_have_been_saved_halfway(folders, monkeypatch):
    """Its content is where an interrupted save left it."""
    from functional_sd3.formats import atomic

    whole, folder = folders
    model = weights.load(whole, dtype="stored")
    changed = model._replace(params={name: tree.map(torch.zeros_like, part) for name, part in model.params.items()})
    monkeypatch.setattr(atomic, "_install", lambda path, owned: None)
    weights.save(whole, changed)
    vae = weights.load(folder, only="vae").params["vae"]
    assert all(not leaf.any() for leaf in tree.leaves(vae))


@pytest.mark.parametrize("where", ["whole", "student"])
def test_either_folder_may_have_the_variant(folders, where):
    for path in list((folders[0].parent / where).rglob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    model = weights.load(folders[1], variant="fp16")
    assert {"vae", "transformer"} <= set(model.params)
    (problem,) = [problem for problem in problems_of(folders[1], variant="bf16") if "variant 'bf16'" in problem][:1]
    assert "no component has weights of the variant" in problem


def test_the_shipped_names_are_folders():
    assert shipped.resolve("tiny") == shipped.folder()
    assert shipped.resolve("other").name == "other"
