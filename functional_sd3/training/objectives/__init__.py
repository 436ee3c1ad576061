"""Objectives of training, each `(params, batch, keys) -> (scalar, metrics)`: `flow` and `vae`."""

from functional_sd3.training.objectives.flow import flow_loss
from functional_sd3.training.objectives.types import Loss, Metrics
from functional_sd3.training.objectives.vae import vae_loss

__all__ = ["Loss", "Metrics", "flow_loss", "vae_loss"]
