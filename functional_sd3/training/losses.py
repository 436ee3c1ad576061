"""What training descends: the rectified-flow loss of a whole model, and the autoencoder's.

A loss is `(params, batch, keys) -> (scalar, metrics)`: batch a tree of tensors (batch, ...), keys (batch, 2) one random
key a sample, metrics a dict of tensors that are means over the batch.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import layers, prng, tree
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.flow import path, schedule
from functional_sd3.image import vae
from functional_sd3.text import conditioning
from functional_sd3.transformer import mmdit

Metrics = dict[str, Tensor]
Loss = Callable[[Params, Tree, Key], tuple[Tensor, Metrics]]


def flow_loss(
    config: Any,
    *,
    density: Callable[[Key, tuple[int, ...]], Tensor] = path.logit_normal,
    shift: float = 1.0,
    dropout: float = 0.0,
    empty: Tree | None = None,
    bins: int = 10,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "sdpa",
) -> Loss:
    """Rectified-flow loss of a whole model: params {"transformer", and any of "clip_l", "clip_g", "t5"}.

    batch: {"latents": normalised (batch, channels, height, width), and either "ids": `conditioning.Ids`, read by the
    encoders in `params` (which learn too, where they are trainable), or "context" and "pooled" computed before}.
    t is drawn from `density` and moved by `shift`. With probability `dropout` a sample's ids, or context and pooled,
    become those of the empty prompt, `empty`: one row of the same entries of the batch. `dtype` is that of the
    computation; gradients stay the parameters'. `implementation`: of attention; "math" has every derivative and every
    batching rule, for jvp, Hessians and per-sample gradients by vmap. Metrics: bin_loss and bin_share (bins,), the part
    of the loss, and of the samples, with t in each of `bins` equal intervals; their quotient is the loss of an
    interval.
    """
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout {dropout} is a probability, between 0 and 1")
    if dropout and empty is None:
        raise ValueError(f"dropout {dropout} needs `empty`, the ids (or context and pooled) of the empty prompt")

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        params = params if dtype is None else layers.cast(params, dtype)
        batch = batch if dtype is None else tree.cast(batch, dtype)
        latents, text = batch["latents"], {name: part for name, part in batch.items() if name != "latents"}
        time_key, noise_key, drop_key = prng.split(keys, 3).unbind(-2)
        t = schedule.shift(density(time_key, ()), shift)
        noise = prng.normal(noise_key, tuple(latents.shape[1:]))
        if dropout:
            text = _dropped(text, empty, prng.bernoulli(drop_key, dropout, ()))
        if "ids" in text:
            context, pooled = conditioning.encode(params, config, text["ids"], implementation=implementation)
        else:
            context, pooled = text["context"], text["pooled"]

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            given = x.to(latents.dtype), t, context, pooled
            return mmdit.apply(params["transformer"], config.transformer, *given, implementation=implementation)

        losses = path.loss(velocity, latents, noise, t)
        # Not by one_hot, which reads its largest index and so cannot be mapped.
        interval = (t * bins).long().clamp(0, bins - 1)
        share = (interval[..., None] == torch.arange(bins, dtype=torch.int64, device=t.device)).to(losses.dtype)
        return losses.mean(), {"bin_loss": (share * losses[:, None]).mean(0), "bin_share": share.mean(0)}

    return loss


def _dropped(text: Tree, empty: Tree, drop: Tensor) -> Tree:
    def pick(given: Tree, blanks: Iterator[Tensor]) -> Tree:
        return tree.map(lambda leaf: torch.where(drop.reshape(-1, *(1,) * (leaf.ndim - 1)), next(blanks), leaf), given)

    return {name: pick(given, iter(tree.leaves(empty[name]))) for name, given in text.items()}


def vae_loss(
    config: vae.Config,
    *,
    distance: Callable[[Tensor, Tensor], Tensor] = lambda a, b: (a - b).abs(),
    divergence: float = 1e-6,
    edges: float = 0.0,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "sdpa",
) -> Loss:
    """Reconstruction + `divergence` * KL + `edges` * |difference of the gradients of the pictures|.

    batch: {"images": (batch, 3, height, width) in [-1, 1]}. `distance` is elementwise (default L1). KL(posterior ||
    N(0, 1)) is summed over a sample's latents and divided by its number of pixel values: the balance of Rombach et al.
    2022, who sum both. `implementation`: as of `flow_loss`. Metrics: reconstruction, kl (nats a latent), psnr in dB,
    latent_mean and latent_square, from which the transformer's scaling and shift are set.
    """

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        params = params if dtype is None else layers.cast(params, dtype)
        images = batch["images"]
        given = images if dtype is None else images.to(dtype)
        mean, logvar = vae.encode(params, config, given, implementation=implementation)
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
