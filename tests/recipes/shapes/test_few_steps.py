"""The recipe of params/tiny-4 with a few updates: it runs, resumes, and its folder refers to that of its teacher."""

import functools

import pytest
import torch

from functional_sd3 import pipeline, weights
from functional_sd3.core import prng, tree
from functional_sd3.recipes.shapes import few_steps, on_policy, report, rewarded, world
from functional_sd3.recipes.shapes.on_policy import States
from functional_sd3.training import log
from functional_sd3.weights import shipped


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_steps, "IMAGES", 8)
        patch.setattr(few_steps, "BATCH", 4)
        patch.setattr(rewarded, "BATCH", 6)
        patch.setattr(on_policy, "STATES", (States(2, 1, 2), States(4, 3, 1)))
        patch.setattr(rewarded, "GROUP", 2)
        # A run lists two hundred thousand captions for its samples; the list is always the same.
        patch.setattr(few_steps.world, "held_out_captions", functools.cache(world.held_out_captions))
        patch.setattr(report, "following", lambda model, settings: f"read: {', '.join(settings)}")
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    words = ["--start", str(shipped.folder()), "--work", str(folder / "work"), "--distill-steps", "2"]
    words += ["--reward-steps", "2", "--on-policy-steps", "2"]
    assert few_steps.main([str(folder / "student"), *words]) == 0
    return folder


def test_the_folder_holds_the_transformer_alone_and_refers_to_the_teacher(made):
    folder = made / "student"
    names = {
        "README.md",
        "error.png",
        "model_index.json",
        "own_error.png",
        "reward.png",
        "samples.png",
        "scheduler",
        "transformer",
    }
    assert {entry.name for entry in folder.iterdir()} == names
    student, teacher = weights.load(folder, dtype="stored"), weights.load(shipped.folder(), dtype="stored")
    changed = {name for name in teacher.params if tree.diff(student.params[name], teacher.params[name])}
    assert changed == {"transformer"} and student.tokenizers == teacher.tokenizers
    levels = student.config.schedule
    assert (levels.distilled_steps, levels.distillation, levels.guidance_distilled) == (2, "segments", True)
    assert (levels.trained_steps, levels.shift) == ((4, 2), few_steps.SHIFT)
    assert "read: four steps, two steps" in (folder / "README.md").read_text()
    for stage, steps in (("distill", "2"), ("rewards", "2"), ("own", "2")):
        assert [row["step"] for row in log.read(made / "work" / stage / "log.csv")] == [steps]


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, made):
    teacher = weights.load(shipped.folder(), dtype=torch.float32)
    for distilled, rounds, own in ((1, 0, 0), (2, 1, 0), (2, 2, 1), (2, 2, 2)):
        steps = {"distill_steps": distilled, "reward_steps": rounds, "on_policy_steps": own, "progress": False}
        student = few_steps.train(tmp_path, teacher, seed=0, **steps)
    assert not tree.diff(student.params["transformer"], again(made, teacher).params["transformer"])


def again(made, teacher):
    """The student of `made`, in float32: all its steps are done."""
    steps = {"distill_steps": 2, "reward_steps": 2, "on_policy_steps": 2}
    return few_steps.train(made / "work", teacher, seed=0, **steps, progress=False)


def test_a_third_of_a_round_is_drawn_in_four_steps_and_the_rest_in_two(monkeypatch):
    drawn = []
    sample = pipeline.sample

    def recorded(params, config, conditions, noise, *, steps, cfg, key):
        drawn.append((steps, cfg, len(noise)))
        return sample(params, config, conditions, noise, steps=steps, cfg=cfg, key=key)

    monkeypatch.setattr(rewarded.pipeline, "sample", recorded)
    model = weights.load(shipped.folder(), dtype=torch.float32)
    settings = few_steps.distill_task.Settings(to=2)
    model = model._replace(config=few_steps.in_steps(few_steps.distill_task.student_config(model.config, settings)))
    task = rewarded.reward_stage(prng.key(1), model, 1, few_steps.POLICY)
    batch = task.rollout(task.state, 0).batch
    assert {each for each in drawn} == {(4, 1.0, 2), (2, 1.0, 2)}
    grid = pipeline.sigmas(model.config, torch.zeros(1, 16, 8, 8), 4)
    assert batch is None or set(batch["t"].tolist()) <= set(grid[:-1].tolist())


def test_parts_of_a_round_are_whole_groups(monkeypatch):
    monkeypatch.setattr(rewarded, "GROUP", 8)
    assert rewarded._parts(64, 2) == [slice(0, 32), slice(32, 64)]
    assert rewarded._parts(24, 2) == [slice(0, 8), slice(8, 24)]
    assert rewarded._parts(64, 1) == [slice(0, 64)]
