"""The recipe of params/tiny, at a few steps of a small world: it runs, goes on, and keeps what it says it keeps."""

import pytest
import torch

from functional_sd3 import weights
from functional_sd3.core import tree
from functional_sd3.recipes.shapes import stages, tiny


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A model of the whole recipe, in miniature."""
    folder = tmp_path_factory.mktemp("recipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "POOL", 64)
        patch.setattr(stages, "FLOW_BATCH", 4)
        patch.setattr(stages, "VAE_BATCH", 2)
        steps = {"vae_steps": 4, "flow_steps": 4, "refine_steps": 4, "progress": False}
        tiny.train(folder / "model", folder / "work", seed=0, **steps)
        model = weights.load(folder / "model", dtype=torch.float32)
        more = steps | {"refine_steps": 4, "start": model, "dtype": torch.bfloat16}
        refined = tiny.train(folder / "refined", folder / "more", seed=1, **more)
    return folder, model, refined


def test_every_stage_leaves_its_log_and_the_model_is_whole(first):
    folder, model, _ = first
    assert set(model.params) == {"clip_l", "clip_g", "t5", "transformer", "vae"}
    for stage in ("vae", "flow", "refine"):
        assert (folder / "work" / stage / "log.csv").exists()


def test_refining_changes_the_transformer_alone(first):
    _, model, refined = first
    for name, params in model.params.items():
        same = tree.allclose(params, refined.params[name], rtol=0, atol=0)
        assert same == (name != "transformer"), name
    assert refined.config == model.config
