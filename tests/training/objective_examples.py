"""Every objective of the transformer over a small model, with a batch that all of them can read."""

import dataclasses
from functools import partial

import torch

from functional_sd3.core import prng
from functional_sd3.flow.ode import transitions
from functional_sd3.layouts.components import Config
from functional_sd3.training import objectives
from functional_sd3.training.objectives import points
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


def draft(model, **options):
    velocity_of = points.model_velocity(model, **options)
    decode = lambda params, latents: latents  # noqa: E731
    return objectives.draft_loss(
        velocity_of, decode, lambda images, rows: images.mean((1, 2, 3)), torch.ones(2).cumsum(0).flip(0) - 1
    )


def makers(model=MODEL, mean=MEAN):
    """Objectives by name: functions of their other options. mean: the config of those that learn a mean velocity."""
    return {
        "flow_loss": partial(objectives.flow_loss, model),
        "nft_loss": partial(objectives.nft_loss, model),
        "awm_loss": partial(objectives.awm_loss, model),
        "ratio_loss": partial(objectives.ratio_loss, model, transitions.flow_sde(0.7)),
        "dpo_loss": partial(objectives.dpo_loss, model),
        "draft_loss": partial(draft, model),
        "scm_loss": partial(objectives.scm_loss, model, zero_teacher),
        "rcm_loss": partial(objectives.rcm_loss, model, zero_teacher, TIMES),
        "fake_score_loss": partial(objectives.fake_score_loss, model, TIMES),
        "meanflow_loss": partial(objectives.meanflow_loss, mean, equal=0.5),
        "shortcut_loss": partial(objectives.shortcut_loss, mean, equal=0.5),
        "segments_loss": partial(objectives.segments_loss, model, zero_teacher, TIMES, inner=1),
    }


MAKERS = makers()


def batch_of(name):
    """The batch of an objective: the flow's reads "noise" where a batch has it."""
    return {key: BATCH[key] for key in ("latents", "context", "pooled")} if name == "flow_loss" else BATCH
