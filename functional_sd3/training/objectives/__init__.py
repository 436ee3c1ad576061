"""Objectives of training, each `(params, batch, keys) -> (scalar, metrics)`.

`flow` and `vae` learn from data, as do `prior` (DreamBooth's prior preservation), `controlnet` and `textual_inversion`;
`segments`, `scm` and `rcm` from a teacher, `meanflow` and `shortcut` from either, to
draw in few steps; `nft`, `awm`, `policy` and `draft` from rewards of a model's own samples, `preference` from pairs.
"""

from functional_sd3.training.objectives.awm import awm_loss
from functional_sd3.training.objectives.controlnet import controlnet_loss
from functional_sd3.training.objectives.draft import draft_loss
from functional_sd3.training.objectives.flow import flow_loss
from functional_sd3.training.objectives.meanflow import meanflow_loss
from functional_sd3.training.objectives.nft import nft_loss
from functional_sd3.training.objectives.policy import ratio_loss
from functional_sd3.training.objectives.preference import dpo_loss
from functional_sd3.training.objectives.prior import prior_loss
from functional_sd3.training.objectives.rcm import fake_score_loss, rcm_loss
from functional_sd3.training.objectives.scm import scm_loss
from functional_sd3.training.objectives.segments import segments_loss
from functional_sd3.training.objectives.shortcut import shortcut_loss
from functional_sd3.training.objectives.textual_inversion import inversion_loss
from functional_sd3.training.objectives.types import Loss, Metrics
from functional_sd3.training.objectives.vae import vae_loss

__all__ = [
    "Loss",
    "Metrics",
    "awm_loss",
    "controlnet_loss",
    "dpo_loss",
    "draft_loss",
    "fake_score_loss",
    "flow_loss",
    "inversion_loss",
    "meanflow_loss",
    "nft_loss",
    "prior_loss",
    "ratio_loss",
    "rcm_loss",
    "scm_loss",
    "segments_loss",
    "shortcut_loss",
    "vae_loss",
]
