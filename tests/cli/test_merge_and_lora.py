"""Merging models and LoRAs from the command line, and what it says of differences and of mistakes."""

from dataclasses import replace

import pytest
import torch

from functional_sd3 import cli, lora, weights
from functional_sd3.core import tree
from functional_sd3.flow import schedule
from functional_sd3.lora import tree as adapters
from functional_sd3.weights import merge
from tests import models


@pytest.fixture(scope="module")
def base():
    return models.random_model()


@pytest.fixture(scope="module")
def tuned(base):
    """The base with a LoRA of rank 2 in its transformer and a first text encoder that differs everywhere."""
    changed = lora.apply(base.params, random_lora(base))
    return base._replace(params={**changed, "clip_l": tree.map(lambda leaf: leaf + 0.1, changed["clip_l"])})


@pytest.fixture(scope="module")
def folders(base, tuned, tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    weights.save(place / "base", base)
    weights.save(place / "tuned", tuned)
    lora.save(place / "style.safetensors", random_lora(base))
    return place


def random_lora(model):
    generator = torch.Generator().manual_seed(1)
    fresh = lora.spec(model.config, 2)
    draw = lambda path, shape: torch.tensor(2.0) if path.endswith("alpha") else torch.randn(shape, generator=generator)  # noqa: E731
    return tree.map_with_path(lambda path, param: draw(path, param.shape) / 4, fresh)


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def close(first, second):
    return tree.allclose(first, second, rtol=1e-4, atol=1e-5)


def test_an_average_of_two_models_has_the_rest_of_the_first(folders, base, tuned, tmp_path, capsys):
    assert run("merge", folders / "base", folders / "tuned", "--weights", "1,3", "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    merged = weights.load(tmp_path / "out")
    pair = [base.params["transformer"], tuned.params["transformer"]]
    assert close(merged.params["transformer"], merge.average(pair, [1, 3]))
    assert not tree.diff(merged.params["clip_l"], base.params["clip_l"]) and merged.tokenizers.t5 is not None


def test_another_schedule_than_the_first_models_is_said(folders, base, tmp_path, capsys):
    levels = schedule.Config(distilled_steps=4, distillation="segments", guidance_distilled=True)
    weights.save(tmp_path / "student", base._replace(config=replace(base.config, schedule=levels)))
    assert run("merge", folders / "base", tmp_path / "student", "--out", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "distillation None and segments" in said and f"the merged model is drawn as {folders / 'base'}" in said
    assert weights.load(tmp_path / "out", only="clip_l").config.schedule == base.config.schedule
    assert run("merge", folders / "base", folders / "tuned", "--out", tmp_path / "same") == 0
    assert "are drawn otherwise" not in capsys.readouterr().err


@pytest.mark.parametrize("words, method", [
    (["--method", "slerp", "--t", 0.25], lambda a, b: merge.slerp(a, b, 0.25)),
    (["--method", "task", "--base", "base", "--weights", "0,0.5"], lambda a, b: merge.task_arithmetic(a, [b], [0.5])),
    (["--method", "ties", "--base", "base", "--density", 0.1], lambda a, b: merge.ties(a, [a, b], density=0.1)),
])  # fmt: skip
def test_every_method_merges_as_its_function_does(folders, base, tuned, tmp_path, words, method):
    words = [folders / word if word == "base" else word for word in words]
    assert run("merge", folders / "base", folders / "tuned", *words, "--part", "all", "--out", tmp_path / "out") == 0
    merged = weights.load(tmp_path / "out")
    for name in base.params:
        assert close(merged.params[name], method(base.params[name], tuned.params[name]))


def test_the_difference_of_two_folders_is_told_by_component_and_layer(folders, capsys):
    assert run("inspect", folders / "tuned", "--against", folders / "base") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "transformer.blocks.0" in lines and lines["vae"].split()[1] == "0" and "vae.encoder.levels" not in lines
    assert float(lines["clip_l"].split()[2]) == pytest.approx(0.1, rel=1e-3)


def test_a_lora_is_merged_with_its_strength(folders, base, tmp_path):
    file = folders / "style.safetensors"
    assert run("lora", "merge", folders / "base", f"{file}=0.5", file, "--out", tmp_path / "out") == 0
    assert close(weights.load(tmp_path / "out").params, lora.apply(base.params, random_lora(base), 1.5))


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_what_was_merged_is_extracted_again(folders, tuned, base, tmp_path, layout, capsys):
    out = tmp_path / "found.safetensors"
    words = ("--rank", 2, "--targets", "transformer.*", "--dtype", "float32", "--layout", layout, "--out", out)
    assert run("lora", "extract", folders / "tuned", folders / "base", *words) == 0
    assert "of which the LoRA holds 100.0%" in capsys.readouterr().err
    found = lora.load(out, base.config)
    assert close(lora.apply(base.params, found)["transformer"], tuned.params["transformer"])
    assert adapters.entries(found).keys() == adapters.entries(random_lora(base)).keys()


def test_info_says_what_a_file_holds_and_whether_it_fits(folders, capsys):
    assert run("lora", "info", folders / "style.safetensors", "--params", folders / "base") == 0
    said = capsys.readouterr().out
    assert "transformer.transformer_blocks.*.attn.to_q: 3 layers of rank 2, alpha 0.5" in said
    assert "adapts 13 weights of" in said
    assert run("lora", "info", folders / "style.safetensors", "--all") == 0
    assert "transformer_blocks.1.attn.to_q: 32 -> 32, rank 2, alpha 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("words, said", [
    (["merge", "base", "tuned", "--method", "ties"], "--method ties needs --base"),
    (["merge", "base"], "an average needs at least two models"),
    (["merge", "base", "base", "tuned", "--method", "slerp"], "between two models, not 3"),
    (["merge", "base", "tuned", "--weights", "1"], "are 1, for 2 models"),
    (["merge", "base", "tuned", "--weights", "a,b"], "must be numbers with commas"),
    (["merge", "base", "tuned", "--method", "slerp", "--weights", "1,2"], "--weights belongs to"),
    (["merge", "base", "tuned", "--base", "base"], "--base belongs to"),
    (["merge", "base", "tuned", "--part", "unet"], "--part unet is not in"),
    (["lora", "merge", "base", "style.safetensors=strong"], "the scale 'strong' must be a number"),
    (["lora", "merge", "base", "absent.safetensors"], "absent.safetensors: no such file"),
    (["lora", "extract", "base", "base"], "no weight that a LoRA can adapt differs"),
])  # fmt: skip
def test_mistakes_end_in_one_line(folders, tmp_path, words, said, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    assert run(*words, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and not (tmp_path / "out").exists()
