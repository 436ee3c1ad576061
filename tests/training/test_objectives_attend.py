"""`attend=` replaces the attention of the transformer in every objective that evaluates one; latents of 16 bits."""

import inspect

import pytest
import torch

from functional_sd3.core import attention, attention_variants
from functional_sd3.training import objectives
from functional_sd3.training.objectives import preference
from tests.training.objective_examples import BATCH, KEYS, MAKERS, MODEL, PARAMS, batch_of


@pytest.mark.parametrize("name", MAKERS)
def test_an_objective_takes_attention_of_ones_own(name):
    called = []

    def counted(streams):
        called.append(len(streams))
        return attention.joint_attention(streams)

    def value(**options):
        return MAKERS[name](**options)({"transformer": PARAMS, "fake": PARAMS}, batch_of(name), KEYS)[0]

    plain = value()
    torch.testing.assert_close(value(attend={2: counted}), plain)
    assert called and set(called) == {2}
    torch.testing.assert_close(value(attend=None), plain)
    assert abs(float(value(attend=attention_variants.linear) - plain)) > 1e-5


@pytest.mark.parametrize("name", ["meanflow_loss", "shortcut_loss", "segments_loss", "scm_loss", "fake_score_loss"])
def test_latents_of_16_bits_are_noised_at_the_same_times_as_wide_ones(name):
    def value(latents):
        batch = {**batch_of(name), "latents": latents}
        return MAKERS[name]()({"transformer": PARAMS, "fake": PARAMS}, batch, KEYS)[0]

    narrow = BATCH["latents"].bfloat16()
    torch.testing.assert_close(value(narrow), value(narrow.float()))


def test_references_of_pairs_are_computed_with_the_same_attention():
    attend = {0: attention_variants.linear}
    loss = objectives.dpo_loss(MODEL, attend=attend)
    batch = preference.add_references(MODEL, BATCH, {"transformer": PARAMS}, attend=attend)
    assert abs(loss({"transformer": PARAMS}, batch, KEYS)[1]["margin"]) < 1e-5


def test_every_objective_of_the_transformer_takes_attend():
    """So that an objective that is added later cannot lack it: `draft_loss` takes a velocity, `vae_loss` has none; what
    is made of `flow_loss` passes its options on."""
    losses = {name: getattr(objectives, name) for name in objectives.__all__ if name.endswith("_loss")}
    of_flow = {name for name, make in losses.items() if "options" in inspect.signature(make).parameters}
    without = {name for name, make in losses.items() if "attend" not in inspect.signature(make).parameters} - of_flow
    assert of_flow == {"controlnet_loss", "inversion_loss", "prior_loss"}
    assert without == {"draft_loss", "vae_loss"} and set(MAKERS) == {*losses} - {"vae_loss"} - of_flow
