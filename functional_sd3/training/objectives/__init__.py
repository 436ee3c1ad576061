"""Objectives of training, each `(params, batch, keys) -> (scalar, metrics)`.

`flow` and `vae` learn from data, `nft` from rewards of a model's own samples.
"""

from functional_sd3.training.objectives.flow import flow_loss
from functional_sd3.training.objectives.nft import nft_loss
from functional_sd3.training.objectives.types import Loss, Metrics
from functional_sd3.training.objectives.vae import vae_loss

__all__ = ["Loss", "Metrics", "flow_loss", "nft_loss", "vae_loss"]
