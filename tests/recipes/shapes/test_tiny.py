"""The recipe of params/tiny with a few steps: it runs, resumes, and keeps its documented files."""

import pytest
import torch

from functional_sd3 import weights
from functional_sd3.core import prng, tree
from functional_sd3.recipes.shapes import stages, tiny
from functional_sd3.training import checkpoint


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "POOL", 64)
        patch.setattr(stages, "FLOW_BATCH", 4)
        patch.setattr(stages, "VAE_BATCH", 2)
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
    decoded = tiny.train(folder / "decoded", folder / "sharp", seed=1, decoder_steps=4, **(more | {"refine_steps": 0}))
    return folder, model, refined, decoded


def test_every_stage_leaves_its_log_and_the_model_is_whole(first):
    folder, model, *_ = first
    assert set(model.params) == {"clip_l", "clip_g", "t5", "transformer", "vae"}
    for stage in ("vae", "flow", "refine", "decoder"):
        assert (folder / "work" / stage / "log.csv").exists()
    assert [curve.name for curve in tiny._curves(folder / "work")] == ["flow_loss", "loss", "psnr"]


def test_refining_changes_the_transformer_alone(first):
    _, model, refined, _ = first
    for name, params in model.params.items():
        assert (not tree.diff(params, refined.params[name])) == (name != "transformer"), name
    assert refined.config == model.config


def test_the_decoder_stage_changes_the_decoder_alone(first):
    folder, model, _, decoded = first
    changed = tree.diff(model.params, decoded.params)
    assert changed and all("vae.decoder." in str(each) for each in changed)
    assert decoded.config == model.config
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
