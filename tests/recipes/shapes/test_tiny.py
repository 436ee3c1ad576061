"""The recipe of params/tiny with a few steps: it runs, resumes, and keeps its documented files."""

import functools

import pytest
import torch

from functional_sd3 import pipeline, weights
from functional_sd3.core import prng, tree
from functional_sd3.recipes import model_card
from functional_sd3.recipes.shapes import rewarded, stages, tiny, world
from functional_sd3.training import checkpoint, log


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "POOL", 64)
        patch.setattr(stages, "FLOW_BATCH", 4)
        patch.setattr(stages, "VAE_BATCH", 2)
        patch.setattr(rewarded, "UNGUIDED", rewarded.UNGUIDED._replace(steps=(2,)))
        patch.setattr(rewarded, "GUIDED", rewarded.GUIDED._replace(steps=(2,)))
        patch.setattr(rewarded, "BATCH", 4)
        patch.setattr(rewarded, "GROUP", 2)
        # A run lists two hundred thousand captions for its samples; the list is always the same.
        patch.setattr(tiny.world, "held_out_captions", functools.cache(world.held_out_captions))
        # The samples that a stage leaves at its end take most of its time.
        patch.setattr(tiny.pipeline, "generate", functools.partial(pipeline.generate, steps=2))
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A model of the whole recipe, in miniature; the same with a refined transformer; and with another decoder."""
    folder = tmp_path_factory.mktemp("recipe")
    steps = {"vae_steps": 4, "flow_steps": 4, "refine_steps": 4, "progress": False}
    tiny.train(folder / "model", folder / "work", seed=0, decoder_steps=4, **steps)
    model = weights.load(folder / "model", dtype=torch.float32)
    more = steps | {"start": model, "dtype": torch.bfloat16}
    refined = tiny.train(folder / "refined", folder / "more", seed=1, **more)
    last = more | {"refine_steps": 0, "decoder_steps": 4, "reward_steps": 2, "guided_steps": 2}
    decoded = tiny.train(folder / "decoded", folder / "sharp", seed=1, **last)
    return folder, model, refined, decoded


def test_every_stage_leaves_its_log_and_the_model_is_whole(first):
    folder, model, *_ = first
    assert set(model.params) == {"clip_l", "clip_g", "t5", "transformer", "vae"}
    for stage in ("vae", "flow", "refine", "decoder"):
        assert (folder / "work" / stage / "log.csv").exists()
    assert [curve.name for curve in model_card.read_curves(folder / "work", tiny.CURVES)] == [
        "flow_loss",
        "loss",
        "psnr",
    ]


def test_refining_changes_the_transformer_alone(first):
    _, model, refined, _ = first
    for name, params in model.params.items():
        assert (not tree.diff(params, refined.params[name])) == (name != "transformer"), name
    assert refined.config == model.config


def test_the_last_stages_change_the_decoder_and_the_transformer_alone(first):
    folder, model, _, decoded = first
    changed = {".".join(each.path.split(".")[:2]) for each in tree.diff(model.params, decoded.params)}
    # Images of a model that has learned nothing are all wrong, which no policy learns from.
    assert changed == {"vae.decoder"} and decoded.config == model.config
    for name in ("rewards", "guided"):
        rounds = log.read(folder / "sharp" / name / "log.csv")
        assert [float(row["all_wrong"]) for row in rounds] == [1.0] and rounds[0]["step"] == "2"
    # Nothing is encoded for a stage that is left out.
    assert not (folder / "sharp" / "pool.safetensors").exists()


def test_a_decoder_stage_that_was_killed_goes_on_to_the_same_bits(first, tmp_path):
    _, model, *_ = first

    def stage():
        return stages.decoder_stage(prng.key(3), model.config, model.params["vae"], 4)

    def advance(state, first_step, last_step):
        own = stage()
        for number in range(first_step, last_step):
            state, _ = own.train_step(state, own.batch(number))
        return state

    whole = advance(stage().state, 0, 4)
    checkpoint.save(tmp_path, 2, advance(stage().state, 0, 2), {})
    resumed = advance(checkpoint.load(checkpoint.paths(tmp_path)[0], like=stage().state), 2, 4)
    assert not tree.diff(whole, resumed)


@pytest.mark.parametrize("name", ["UNGUIDED", "GUIDED"])
def test_rewards_move_the_transformer_where_some_images_are_right(first, monkeypatch, name):
    _, model, *_ = first

    # A reward with spread: the brighter half of the images.
    def scored(images, captions, scenes):
        bright = (images.mean((1, 2, 3)) > images.mean()).float()
        return {"right": bright}

    monkeypatch.setattr(rewarded.rewards, "shapes", scored)
    task = rewarded.reward_stage(prng.key(4), model, 1, getattr(rewarded, name))
    state, metrics = task.train_step(task.state, task.rollout(task.state, task.batch(0)))
    assert float(metrics["spread"]) > 0 and float(metrics["grad_norm"]) > 0
    changed = task.model(state).params
    assert {name for name in changed if tree.diff(changed[name], model.params[name])} == {"transformer"}


def test_shares_of_the_changes_of_several_runs_are_added(first):
    _, model, *_ = first
    moved = [
        model._replace(
            params={**model.params, "transformer": tree.map(lambda leaf, by=by: leaf + by, model.params["transformer"])}
        )
        for by in (1.0, 3.0)
    ]
    total = rewarded.add_changes(model, [(0.5, moved[0]), (0.25, moved[1])])
    expected = tree.map(lambda leaf: leaf + 1.25, model.params["transformer"])
    assert tree.allclose(total.params["transformer"], expected, atol=1e-5)
    assert total.params["vae"] is model.params["vae"]
    assert not tree.diff(rewarded.add_changes(model, []).params, model.params)
