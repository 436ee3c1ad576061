"""A scheduler config with `stochastic_sampling` is followed: `ode.renoised` is the method of runs that name none."""

import json
import shlex
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

from functional_sd3 import cli, pipeline, weights
from functional_sd3.core import prng
from functional_sd3.flow import ode, schedule
from tests import models
from tests.models import parts

PROMPTS = ["a red circle", "a blue star"]
KEY = prng.key(4)


@pytest.fixture(scope="module")
def model():
    plain = models.random_model()
    return plain._replace(config=replace(plain.config, schedule=schedule.Config(stochastic_sampling=True)))


def test_the_default_method_is_the_schedules_and_another_wins_over_it(model):
    draw = partial(pipeline.generate, *parts(model), PROMPTS, KEY, steps=3)
    renoised = draw(method=ode.renoised(pipeline.step_keys(KEY, 2)))
    assert torch.equal(draw(), renoised)
    assert not torch.allclose(draw(method=ode.EULER), renoised, atol=1e-2)
    plain = model._replace(config=models.config())
    assert torch.equal(pipeline.generate(*parts(plain), PROMPTS, KEY, steps=3), draw(method=ode.EULER))
    assert pipeline.default_method(model.config) == "euler_renoised"
    assert pipeline.default_method(plain.config) == "euler"


def test_the_noise_of_a_sample_is_its_own_in_any_batch(model):
    keys = prng.split(prng.key(1), 2)
    together = pipeline.generate(*parts(model), PROMPTS, keys, steps=3)
    for index, prompt in enumerate(PROMPTS):
        alone = pipeline.generate(*parts(model), prompt, keys[index : index + 1], steps=3)
        torch.testing.assert_close(alone[0], together[index], atol=1e-4, rtol=0)


def test_a_run_without_a_key_says_what_it_lacks(model):
    conditions = pipeline.encode(*parts(model), PROMPTS)
    noise = pipeline.initial_noise(KEY, model.config, 2)
    with pytest.raises(ValueError, match="stochastic_sampling.*give key=, or a method"):
        pipeline.sample(model.params, model.config, conditions, noise, steps=2)
    assert pipeline.sample(model.params, model.config, conditions, noise, steps=2, key=KEY).shape == noise.shape


def test_every_way_to_draw_has_its_noise(model):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    region = pipeline.Region("a blue star", torch.ones(1, 1, 64, 64))
    prompt, given = PROMPTS[0], parts(model)
    ways = {
        "image_to_image": partial(pipeline.image_to_image, *given, prompt, image, KEY),
        "inpaint": partial(pipeline.inpaint, *given, prompt, image, torch.ones(1, 1, 64, 64), KEY),
        "variations": partial(pipeline.variations, *given, prompt, KEY, towards=prng.key(5)),
        "interpolate": partial(pipeline.interpolate, *given, PROMPTS, KEY, frames=2),
        "regional": partial(pipeline.regional, *given, prompt, [region], KEY),
        "tiled": partial(pipeline.tiled, *given, prompt, KEY, height=64, width=64),
        "trajectory": partial(pipeline.trajectory, *given, prompt, KEY),
    }
    for name, draw in ways.items():
        one = draw(steps=2)
        assert torch.equal(one, draw(steps=2)) and not torch.equal(one, draw(steps=2, method=ode.EULER)), name


def test_an_edit_follows_one_flow_there_and_back(model):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    told = (*parts(model), PROMPTS[0], PROMPTS[1], image)
    for edit in (partial(pipeline.edit, *told), partial(pipeline.flow_edit, *told, KEY)):
        assert torch.equal(edit(steps=2), edit(steps=2, method=ode.EULER))


@pytest.mark.parametrize("wrong", [{"invert_sigmas": True}, {"use_karras_sigmas": True, "use_beta_sigmas": True}])
def test_fields_that_contradict_one_another_are_refused_when_loaded(model, tmp_path, wrong):
    weights.save(tmp_path / "model", model)
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
    with pytest.raises(weights.WeightsError, match="invert_sigmas|only one of"):
        weights.load(tmp_path / "model")


def test_the_command_line_follows_the_folder_and_method_wins(model, tmp_path, capsys):
    weights.save(tmp_path / "model", model)
    assert weights.load(tmp_path / "model").config.schedule.stochastic_sampling

    def drawn(name, *words):
        out = tmp_path / name
        common = ["generate", PROMPTS[0], "--params", tmp_path / "model", "--steps", 3, "--seed", 5, "--out", out]
        assert cli.main([str(word) for word in (*common, *words)]) == 0
        with Image.open(out) as image:
            return torch.tensor(list(image.tobytes()))

    usual, euler = drawn("usual.png"), drawn("euler.png", "--method", "euler")
    assert torch.equal(usual, drawn("renoised.png", "--method", "euler_renoised"))
    assert not torch.equal(usual, euler)
    with torch.no_grad():
        image = pipeline.generate(*parts(model), PROMPTS[0], prng.key(torch.tensor([5])), steps=3)
    expected = (image[0] * 255).round().to(torch.int64).permute(1, 2, 0).flatten()
    assert (usual - expected).abs().max() <= 1
    # The settings inside make each of them again.
    for name, before in (("usual.png", usual), ("euler.png", euler)):
        capsys.readouterr()
        assert cli.main(["inspect", str(tmp_path / name)]) == 0
        words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
        assert cli.main([*words[1:], "--out", str(tmp_path / "again.png")]) == 0
        with Image.open(tmp_path / "again.png") as again:
            assert torch.equal(torch.tensor(list(again.tobytes())), before)
