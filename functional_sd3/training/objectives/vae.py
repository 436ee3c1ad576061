"""Objective of the autoencoder: reconstruction and Kullback-Leibler divergence (Rombach et al. 2022, appendix G)."""

from collections.abc import Callable

import torch
from torch import Tensor

from functional_sd3.core import layers, prng
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.image import vae
from functional_sd3.training.objectives.types import Loss, Metrics, check_keys


def vae_loss(
    config: vae.Config,
    *,
    distance: Callable[[Tensor, Tensor], Tensor] = lambda a, b: (a - b).abs(),
    divergence: float = 1e-6,
    edges: float = 0.0,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "sdpa",
) -> Loss:
    """Reconstruction + `divergence` * KL + `edges` * |difference of the gradients of the images|.

    batch: {"images": (batch, 3, height, width) in [-1, 1]}. `distance` is elementwise (default L1). KL(posterior ||
    N(0, 1)) is summed over a sample's latents and divided by its number of pixel values: the balance of Rombach et al.
    2022, who sum both. `implementation`: as of `flow_loss`. Metrics: reconstruction, kl (nats a latent), psnr in dB,
    latent_mean and latent_square, from which the transformer's scaling and shift are set.
    """

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        params = params if dtype is None else layers.cast(params, dtype)
        images = batch["images"]
        check_keys(keys, images)
        inputs = images if dtype is None else images.to(dtype)
        mean, logvar = vae.encode(params, config, inputs, implementation=implementation)
        latents = mean + torch.exp(0.5 * logvar) * prng.normal(keys, tuple(mean.shape[1:]), dtype=mean.dtype)
        decoded = vae.decode(params, config, latents, implementation=implementation).to(images.dtype)
        mean, logvar = mean.float(), logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)
        reconstruction = distance(decoded, images).mean()
        # Numbers before the sums: torch 2.13 makes the tangent of a scalar float64 where a number multiplies it.
        total = reconstruction + (divergence / images.numel() * kl).sum()
        if edges:
            total = total + sum((edges * (decoded.diff(dim=d) - images.diff(dim=d)).abs()).mean() for d in (-2, -1))
        squares = (decoded - images).square().flatten(1).mean(1)
        return total, {
            "reconstruction": reconstruction,
            "kl": kl.mean(),
            "psnr": (10.0 * torch.log10(4.0 / squares.clamp_min(1e-10))).mean(),
            "latent_mean": mean.mean(),
            "latent_square": mean.square().mean() + logvar.exp().mean(),
        }

    return loss
