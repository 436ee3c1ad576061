"""Latents as colours: a linear decoder fitted to the images of a run, for what no VAE decodes, such as velocities."""

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 1 << 16
_RIDGE = 1e-3


def linear_decoder(latents: Tensor, images: Tensor) -> Tensor:
    """(channels, 3): the matrix that best gives the colours of images by their latents, up to a constant.

    latents (n, channels, h, w); images (n, 3, H, W), decoded from them: their mean over the pixels of each latent is
    fitted by least squares with a small ridge.
    """
    colours = (
        F.adaptive_avg_pool2d(images.double(), (latents.shape[-2], latents.shape[-1])).permute(0, 2, 3, 1).flatten(0, 2)
    )
    features = latents.double().permute(0, 2, 3, 1).flatten(0, 2)
    every = max(1, len(features) // _ROWS)
    features, colours = features[::every], colours[::every]
    features, colours = features - features.mean(0), colours - colours.mean(0)
    square = features.T @ features
    ridge = (_RIDGE * square.diagonal().mean().clamp_min(1e-12)).expand(len(square)).diag()
    return torch.linalg.solve(square + ridge, features.T @ colours).float()


def as_colours(latents: Tensor, decoder: Tensor) -> Tensor:
    """(n, channels, h, w) -> (n, 3, h, w) in [0, 1]: grey is 0, and one scale for all."""
    colours = torch.einsum("nchw,cr->nrhw", latents.float(), decoder)
    flat = colours.abs().flatten()
    largest = flat[:: max(1, len(flat) // 1_000_000)].quantile(0.99).clamp_min(1e-12)
    return (0.5 + 0.5 * colours / largest).clamp(0, 1)
