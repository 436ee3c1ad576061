"""Rectified-flow objective of the transformer and its text encoders.

Esser et al. 2024, "Scaling Rectified Flow Transformers", sections 2 and 3.1.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import computation, prng, tree
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.flow import path, schedule
from functional_sd3.flow.loss_weights import Weight
from functional_sd3.text import conditioning
from functional_sd3.training.objectives.types import Loss, Metrics, check_keys
from functional_sd3.transformer import mmdit


class Samples(NamedTuple):
    """Losses (batch,) of the samples, without their weights; the weights (batch,), None for 1; their times (batch,)."""

    losses: Tensor
    weights: Tensor | None
    t: Tensor


Residuals = Callable[[Params, Tree, Tensor, Tensor, Tensor, Tensor], Sequence[Tensor]]
"""`mmdit.apply`'s residuals of params, a batch, noised latents, times, context and pooled."""
Summary = Callable[[Samples, Tree], tuple[Tensor, Metrics]]
"""Scalar loss and metrics of a batch, given the losses of its samples."""


def flow_loss(
    config: Any,
    *,
    density: Callable[[Key, tuple[int, ...]], Tensor] = path.logit_normal,
    shift: float = 1.0,
    weight: Weight | None = None,
    dropout: float = 0.0,
    empty: Tree | None = None,
    bins: int = 10,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "sdpa",
    attend: mmdit.AttendBlocks | None = None,
    residuals: Residuals | None = None,
    summary: Summary | None = None,
) -> Loss:
    """Rectified-flow loss of a whole model: params {"transformer", and any of "clip_l", "clip_g", "t5"}.

    batch: {"latents": normalised (batch, channels, height, width), and either "ids": `conditioning.Ids`, read by the
    encoders in `params` (which are trained too, where trainable), or "context" and "pooled" computed before}. Optional:
    "noise" like latents, the other end of each line (reflow), else drawn from the keys; "t" (batch,), else drawn;
    "mask" (batch, 1, height, width), a factor of the squared error of each latent (masked loss); "weight" (batch,), a
    factor of each sample's loss. These three are float32.
    t is drawn from `density` and moved by `shift`; `weight`: w(t) of `flow.loss_weights`, None for 1. With probability
    `dropout` a sample's ids, or context and pooled, become those of the empty prompt, `empty`: one row of the same
    entries of the batch. `dtype` is that of the computation; gradients stay the parameters'.
    `implementation`: as in `attention.attention`; `attend`: as in `mmdit.apply`; `residuals`: added to its blocks, as a
    ControlNet's are. Metrics: bin_loss and bin_share (bins,), the part of the loss before weights, and of the samples,
    with t in each of `bins` equal intervals; their quotient is the loss of an interval. `summary` replaces the weighted
    mean and adds metrics. keys (batch, 2), one for each sample: `prng.split(key, batch)`. Raises ValueError for others.
    """
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout {dropout} is a probability, between 0 and 1")
    if dropout and empty is None:
        raise ValueError(f"dropout {dropout} needs `empty`, the ids (or context and pooled) of the empty prompt")

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        params, model = computation.cast_model(params, config, dtype)
        kept = {name: batch[name] for name in _FLOAT32 if name in batch}
        batch = batch if dtype is None else {**tree.cast(batch, dtype), **kept}
        if "latents" in batch:
            check_keys(keys, batch["latents"])
        _check(batch)
        if "transformer" not in params:
            raise ValueError(
                f"params are of {list(params)[:8]}; an objective takes {{'transformer': ...}}, as model.params"
            )
        latents = batch["latents"]
        text = {name: batch[name] for name in _TEXT if name in batch}
        time_key, noise_key, drop_key = prng.split(keys, 3).unbind(-2)
        t = batch["t"] if "t" in batch else schedule.shift(density(time_key, ()), shift)
        noise = batch["noise"] if "noise" in batch else prng.normal(noise_key, tuple(latents.shape[1:]))
        if dropout:
            text = _dropped(text, empty, prng.bernoulli(drop_key, dropout, ()))
        if "ids" in text:
            context, pooled = conditioning.encode(params, model, text["ids"], implementation=implementation)
        else:
            context, pooled = text["context"], text["pooled"]

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            x = x.to(latents.dtype)
            added = residuals(params, batch, x, t, context, pooled) if residuals else ()
            options = computation.of(model, "transformer").options
            return mmdit.apply(
                params["transformer"], config.transformer, x, t, context, pooled,
                residuals=added, implementation=implementation, attend=attend, **options,
            )  # fmt: skip

        losses = path.loss(velocity, latents, noise, t, mask=batch.get("mask"))
        weights = batch.get("weight")
        if weight is not None:
            weights = weight(t) if weights is None else weights * weight(t)
        samples = Samples(losses, weights, t)
        value, metrics = (summary or mean_loss)(samples, batch)
        return value, {**_bins(samples, bins), **metrics}

    return loss


def mean_loss(samples: Samples, batch: Tree) -> tuple[Tensor, Metrics]:
    """Mean of the losses times their weights, ()."""
    losses, weights, _ = samples
    return (losses if weights is None else weights * losses).mean(), {}


def _bins(samples: Samples, bins: int) -> Metrics:
    losses, _, t = samples
    # Not by one_hot, which reads its largest index and so cannot be mapped.
    interval = (t * bins).long().clamp(0, bins - 1)
    share = (interval[..., None] == torch.arange(bins, dtype=torch.int64, device=t.device)).to(losses.dtype)
    return {"bin_loss": (share * losses[:, None]).mean(0), "bin_share": share.mean(0)}


_TEXT = ("ids", "context", "pooled")
_FLOAT32 = ("t", "weight", "mask")
"""Entries of a batch that are not cast to the dtype of the computation."""


def _check(batch: Tree) -> None:
    """Raises ValueError for a batch that lacks an entry, or has no samples, whose mean would be NaN."""
    absent = [name for name in ("latents", *(() if "ids" in batch else ("context", "pooled"))) if name not in batch]
    if absent:
        raise ValueError(
            f"the batch has no {' and no '.join(absent)}; it holds latents, and ids or context and pooled, not only "
            f"{', '.join(map(str, batch)) or 'nothing'}"
        )
    if not len(batch["latents"]):
        raise ValueError(f"the batch's latents {list(batch['latents'].shape)} must be of one sample at least")


def _dropped(text: Tree, empty: Tree, drop: Tensor) -> Tree:
    """`text` with the rows where `drop` (batch,) is True replaced by `empty`."""

    def pick(inputs: Tree, blanks: Iterator[Tensor]) -> Tree:
        return tree.map(lambda leaf: torch.where(drop.reshape(-1, *(1,) * (leaf.ndim - 1)), next(blanks), leaf), inputs)

    return {name: pick(inputs, iter(tree.leaves(empty[name]))) for name, inputs in text.items()}
