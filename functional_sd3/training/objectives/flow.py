"""Rectified-flow objective of the transformer and its text encoders.

Esser et al. 2024, "Scaling Rectified Flow Transformers", sections 2 and 3.1.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import computation, prng, tree
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.flow import path, schedule
from functional_sd3.text import conditioning
from functional_sd3.training.objectives.types import Loss, Metrics, check_keys
from functional_sd3.transformer import mmdit


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
    attend: mmdit.AttendBlocks | None = None,
) -> Loss:
    """Rectified-flow loss of a whole model: params {"transformer", and any of "clip_l", "clip_g", "t5"}.

    batch: {"latents": normalised (batch, channels, height, width), and either "ids": `conditioning.Ids`, read by the
    encoders in `params` (which are trained too, where trainable), or "context" and "pooled" computed before}; "noise"
    like latents: the other end of each line (reflow), else drawn from the keys.
    t is drawn from `density` and moved by `shift`. With probability `dropout` a sample's ids, or context and pooled,
    become those of the empty prompt, `empty`: one row of the same entries of the batch. `dtype` is that of the
    computation; gradients stay the parameters'. `implementation`: as of `attention.attention`; `attend`: as of
    `mmdit.apply`. Metrics: bin_loss and bin_share (bins,), the part of the loss, and of the samples, with t in each of
    `bins` equal intervals; their quotient is the loss of an interval. keys (batch, 2), a key for each sample:
    `prng.split(key, batch)`; ValueError for others.
    """
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout {dropout} is a probability, between 0 and 1")
    if dropout and empty is None:
        raise ValueError(f"dropout {dropout} needs `empty`, the ids (or context and pooled) of the empty prompt")

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        params, model = computation.cast_model(params, config, dtype)
        batch = batch if dtype is None else tree.cast(batch, dtype)
        if "latents" in batch:
            check_keys(keys, batch["latents"])
        _check(batch)
        latents = batch["latents"]
        text = {name: part for name, part in batch.items() if name not in ("latents", "noise")}
        time_key, noise_key, drop_key = prng.split(keys, 3).unbind(-2)
        t = schedule.shift(density(time_key, ()), shift)
        noise = batch["noise"] if "noise" in batch else prng.normal(noise_key, tuple(latents.shape[1:]))
        if dropout:
            text = _dropped(text, empty, prng.bernoulli(drop_key, dropout, ()))
        if "ids" in text:
            context, pooled = conditioning.encode(params, model, text["ids"], implementation=implementation)
        else:
            context, pooled = text["context"], text["pooled"]

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            inputs = x.to(latents.dtype), t, context, pooled
            options = computation.of(model, "transformer").options
            return mmdit.apply(
                params["transformer"],
                config.transformer,
                *inputs,
                implementation=implementation,
                attend=attend,
                **options,
            )

        losses = path.loss(velocity, latents, noise, t)
        # Not by one_hot, which reads its largest index and so cannot be mapped.
        interval = (t * bins).long().clamp(0, bins - 1)
        share = (interval[..., None] == torch.arange(bins, dtype=torch.int64, device=t.device)).to(losses.dtype)
        return losses.mean(), {"bin_loss": (share * losses[:, None]).mean(0), "bin_share": share.mean(0)}

    return loss


def _check(batch: Tree) -> None:
    """Raise ValueError for a batch that lacks an entry, or has no samples, whose mean would be NaN."""
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
