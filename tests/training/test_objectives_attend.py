"""`attend=` replaces the attention of the transformer in every objective that evaluates one."""

import dataclasses
import inspect
from functools import partial

import pytest
import torch

from functional_sd3.core import attention, attention_variants, prng
from functional_sd3.flow.ode import transitions
from functional_sd3.layouts.components import Config
from functional_sd3.training import objectives
from functional_sd3.training.objectives import points, preference
from functional_sd3.transformer import mmdit
from tests import models

CONFIG = mmdit.Config(
    depth=3, heads=2, head_dim=8, in_channels=2, out_channels=2, context_width=6, pooled_width=5, position_size=8,
    sample_size=8, qk_norm=True,
)  # fmt: skip
MODEL = Config(transformer=CONFIG)
MEAN = Config(transformer=dataclasses.replace(CONFIG, interval_size=4))
PARAMS = models.random_leaves(mmdit.spec(MEAN.transformer))
KEYS = prng.split(prng.key(0), 2)


def random(seed, *shape):
    return prng.normal(prng.key(seed), shape)


TIMES = torch.tensor([1.0, 0.6, 0.0])
LATENTS = (
    "latents", "noise", "x", "x_next", "old", "reference", "old_mean", "reference_mean", "winner", "loser",
    "winner_old", "loser_old",
)  # fmt: skip
BATCH = {
    **{name: random(10 + index, 2, 2, 8, 8) for index, name in enumerate(LATENTS)},
    **{"context": random(2, 2, 3, 6), "pooled": random(3, 2, 5), "advantage": torch.tensor([1.0, -2.0])},
    **{"t": torch.tensor([0.7, 0.9]), "s": torch.tensor([0.5, 0.6])},
}


def zero_teacher(batch):
    return lambda x, t: torch.zeros_like(x)


def draft(**options):
    velocity_of = points.model_velocity(MODEL, **options)
    decode = lambda params, latents: latents  # noqa: E731
    return objectives.draft_loss(
        velocity_of, decode, lambda images, rows: images.mean((1, 2, 3)), torch.ones(2).cumsum(0).flip(0) - 1
    )


MAKERS = {
    "flow_loss": partial(objectives.flow_loss, MODEL),
    "nft_loss": partial(objectives.nft_loss, MODEL),
    "awm_loss": partial(objectives.awm_loss, MODEL),
    "ratio_loss": partial(objectives.ratio_loss, MODEL, transitions.flow_sde(0.7)),
    "dpo_loss": partial(objectives.dpo_loss, MODEL),
    "draft_loss": draft,
    "scm_loss": partial(objectives.scm_loss, MODEL, zero_teacher),
    "rcm_loss": partial(objectives.rcm_loss, MODEL, zero_teacher, TIMES),
    "fake_score_loss": partial(objectives.fake_score_loss, MODEL, TIMES),
    "meanflow_loss": partial(objectives.meanflow_loss, MEAN, equal=0.5),
    "shortcut_loss": partial(objectives.shortcut_loss, MEAN, equal=0.5),
    "segments_loss": partial(objectives.segments_loss, MODEL, zero_teacher, TIMES, inner=1),
}


@pytest.mark.parametrize("name", MAKERS)
def test_an_objective_takes_attention_of_ones_own(name):
    called = []

    def counted(streams):
        called.append(len(streams))
        return attention.joint_attention(streams)

    def value(**options):
        batch = {key: BATCH[key] for key in ("latents", "context", "pooled")} if name == "flow_loss" else BATCH
        return MAKERS[name](**options)({"transformer": PARAMS, "fake": PARAMS}, batch, KEYS)[0]

    plain = value()
    torch.testing.assert_close(value(attend={2: counted}), plain)
    assert called and set(called) == {2}
    torch.testing.assert_close(value(attend=None), plain)
    assert abs(float(value(attend=attention_variants.linear) - plain)) > 1e-5


def test_references_of_pairs_are_computed_with_the_same_attention():
    attend = {0: attention_variants.linear}
    loss = objectives.dpo_loss(MODEL, attend=attend)
    batch = preference.add_references(MODEL, BATCH, {"transformer": PARAMS}, attend=attend)
    assert abs(loss({"transformer": PARAMS}, batch, KEYS)[1]["margin"]) < 1e-5


def test_every_objective_of_the_transformer_takes_attend():
    """So that an objective that is added later cannot lack it: `draft_loss` takes a velocity, `vae_loss` has none."""
    losses = {name: getattr(objectives, name) for name in objectives.__all__ if name.endswith("_loss")}
    without = {name for name, make in losses.items() if "attend" not in inspect.signature(make).parameters}
    assert without == {"draft_loss", "vae_loss"} and set(MAKERS) == {*losses} - {"vae_loss"}
