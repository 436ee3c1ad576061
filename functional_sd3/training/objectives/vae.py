"""Objective of the autoencoder: reconstruction and Kullback-Leibler divergence (Rombach et al. 2022, appendix G)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
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
    scales: int = 1,
    noise: float = 1.0,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "sdpa",
) -> Loss:
    """Reconstruction + `divergence` * KL + `edges` * difference of the images' gradients.

    batch: {"images": (batch, 3, height, width) in [-1, 1]}. `distance` is elementwise (default L1). KL(posterior ||
    N(0, 1)) is summed over a sample's latents and divided by its number of pixel values: the balance of Rombach et al.
    2022, who sum both. With the error E = decoded - images, averaged over squares of 2^k pixels a side as E_k, the
    difference of the gradients is the sum over k < `scales` of mean |dE_k/dx| + mean |dE_k/dy| (multi-scale gradient
    matching, Li & Snavely 2018, "MegaDepth", equation 3, which takes every 2^k-th pixel): it weighs corners and thin
    lines, which are few pixels of a plain image.

    noise: factor on the posterior's standard deviation; 1 decodes a draw of the posterior, 0 its mean, which is what
    a decoder that learns alone has to decode. `implementation`: as in `flow_loss`. Metrics: reconstruction, kl (nats a
    latent), psnr in dB, latent_mean and latent_square, from which the transformer's scaling and shift are set. Raises
    ValueError for `edges` or `noise` below 0 or not finite, and `scales` below 1 or too many for the images.
    """
    for name, value in (("edges", edges), ("noise", noise)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} {value} must be a finite number of at least 0")
    if scales < 1:
        raise ValueError(f"scales {scales} must be at least 1")
    if scales > 1 and not edges:
        raise ValueError(f"scales {scales} are those of `edges`, whose weight is 0")

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        params = params if dtype is None else layers.cast(params, dtype)
        images = batch["images"]
        check_keys(keys, images)
        inputs = images if dtype is None else images.to(dtype)
        mean, logvar = vae.encode(params, config, inputs, implementation=implementation)
        deviation = noise * torch.exp(0.5 * logvar)
        latents = mean + deviation * prng.normal(keys, tuple(mean.shape[1:]), dtype=mean.dtype)
        decoded = vae.decode(params, config, latents, implementation=implementation).to(images.dtype)
        mean, logvar = mean.float(), logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)
        reconstruction = distance(decoded, images).mean()
        # Numbers before the sums: torch 2.13 makes the tangent of a scalar float64 where a number multiplies it.
        total = reconstruction + (divergence / images.numel() * kl).sum()
        if edges:
            total = total + _gradient_difference(decoded - images, scales, edges)
        squares = (decoded - images).square().flatten(1).mean(1)
        return total, {
            "reconstruction": reconstruction,
            "kl": kl.mean(),
            "psnr": (10.0 * torch.log10(4.0 / squares.clamp_min(1e-10))).mean(),
            "latent_mean": mean.mean(),
            "latent_square": mean.square().mean() + logvar.exp().mean(),
        }

    return loss


def _gradient_difference(error: Tensor, scales: int, weight: float) -> Tensor:
    """`weight` times the means of the absolute differences of neighbours in `error`, over all scales and directions."""
    height, width = error.shape[-2:]
    if min(height, width) < 2**scales:
        raise ValueError(f"scales {scales} are too many for images of {height} x {width}: squares have no neighbours")
    terms = []
    for scale in range(scales):
        averaged = F.avg_pool2d(error, 2**scale) if scale else error
        terms += [(weight * averaged.diff(dim=direction).abs()).mean() for direction in (-2, -1)]
    return torch.stack(terms).sum()
