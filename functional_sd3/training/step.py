"""One training step as a pure function: `train_step(state, batch) -> (state, metrics)`, and the losses it descends.

A loss is `(params, batch, keys) -> (scalar, metrics)`: `batch` a tree of tensors (batch, ...), `keys` (batch, 2) one random
key a sample, metrics a dict of tensors that are means over the batch. Because a sample's randomness is its own, a batch in
parts gives the gradient of the whole.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core import prng, transform, tree
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.flow import path, schedule
from functional_sd3.image import vae
from functional_sd3.text import conditioning
from functional_sd3.training import optim
from functional_sd3.transformer import mmdit

Metrics = dict[str, Tensor]
Loss = Callable[[Params, Tree, Key], tuple[Tensor, Metrics]]
Gradient = Callable[[Params, Params, Tree, Key], tuple[Params, tuple[Tensor, Metrics]]]


class TrainState(NamedTuple):
    """All that a run is, as trees: parameters, optimiser state, their moving average, steps done (int64 ()), key.

    The optimiser's state covers the trainable leaves only; `ema` is a whole parameter tree.
    """

    params: Params
    optimizer: Tree
    ema: Params
    step: Tensor
    key: Key


def init(key: Key, params: Params, optimizer: optim.Optimizer, *, trainable: tree.Chooser = "*") -> TrainState:
    """The state before the first step. Parameters are copied, so that a donated step leaves the caller's alone."""
    device = next(iter(tree.leaves(params))).device
    copies, ema = (tree.map(_copy, params) for _ in range(2))
    learned, _ = tree.partition(copies, trainable)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return TrainState(copies, optimizer.init(learned), ema, zero, key.to(device))


def _copy(leaf: Tensor) -> Tensor:
    # Contiguous whatever came in: a file keeps no strides, and a resumed run has to compute in the same order.
    return leaf.detach().clone(memory_format=torch.contiguous_format)


def trainable(spec: Tree, only: tree.Chooser = "*") -> Callable[[str, Any], bool]:
    """The leaves that are learned: those of the spec not marked otherwise, that `only` chooses."""
    names = {name for name, param in tree.select(spec, only).items() if param.trainable}
    return lambda name, leaf: name in names


def make_train_step(
    loss: Loss,
    optimizer: optim.Optimizer,
    *,
    trainable: tree.Chooser = "*",
    ema_decay: float = 0.9999,
    accumulate: int = 1,
    compile: bool = False,
    gradient: Literal["autograd", "func"] | None = None,
    donate: bool | Literal["debug"] = False,
    rate: optim.Schedule | None = None,
) -> Callable[[TrainState, Tree], tuple[TrainState, Metrics]]:
    """The step of a loss and an optimiser. Metrics: loss, grad_norm, what the loss reports, and `rate` if given.

    Sample i of step n draws from `split(fold_in(state.key, n), batch)[i]`. `accumulate` parts of a batch, one after the other,
    give the same step in less memory. `gradient`: "func" is torch.func.grad_and_value, by default when compiled, as one
    graph; "autograd" is `transform.value_and_grad`, which takes half of its memory in eager mode and is the default there.
    `donate` overwrites the memory of the state it is given, which is then spent; "debug" makes using it fail.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate {accumulate} must be at least 1")
    differentiate = _accumulated(_gradient(loss, gradient or ("func" if compile else "autograd"), compile), accumulate)

    def train_step(state: TrainState, batch: Tree) -> tuple[TrainState, Metrics]:
        size = next(iter(tree.leaves(batch))).shape[0]
        keys = prng.split(prng.fold_in(state.key, state.step), size)
        learned, fixed = tree.partition(state.params, trainable)
        grads, (value, reported) = differentiate(learned, fixed, batch, keys)
        with torch.no_grad():
            metrics = {"loss": value, "grad_norm": optim.global_norm(grads), **reported}
            if rate is not None:
                metrics["rate"] = rate(state.step)
            return _advance(optimizer, grads, state, learned, fixed, ema_decay, donate), metrics

    return train_step


def _advance(
    optimizer: optim.Optimizer,
    grads: Params,
    state: TrainState,
    learned: Params,
    fixed: Params,
    ema_decay: float,
    donate: bool | str,
) -> TrainState:
    if not donate:
        updates, optimizer_state = optimizer.update(grads, state.optimizer, learned)
        params = tree.combine(optim.apply_updates(learned, updates), fixed)
        ema = optim.ema_update(state.ema, params, ema_decay, state.step)
        return TrainState(params, optimizer_state, ema, state.step + 1, state.key)
    optim.check_donated({"params": learned, "ema": state.ema, "optimizer": state.optimizer})
    learned, optimizer_state = optim.donate(optimizer, grads, state.optimizer, learned)
    params = tree.combine(learned, fixed)
    ema = optim.ema_update(state.ema, params, ema_decay, state.step, donate=True)
    advanced = TrainState(params, optimizer_state, ema, state.step + 1, state.key)
    if donate == "debug":
        # Steps and key are small and never overwritten, so the old ones stay readable.
        spent = optim.poison((advanced.params, advanced.optimizer, advanced.ema))
        advanced = TrainState(*spent, advanced.step, advanced.key)
    return advanced


_GRADIENTS = ("autograd", "func")


def _gradient(loss: Loss, gradient: str, compile: bool) -> Gradient:
    def whole(learned: Params, fixed: Params, batch: Tree, keys: Key) -> tuple[Tensor, tuple[Tensor, Metrics]]:
        value, metrics = loss(tree.combine(learned, fixed), batch, keys)
        return value, (value.detach(), {name: metric.detach() for name, metric in metrics.items()})

    if gradient not in _GRADIENTS:
        raise ValueError(f"gradient {gradient!r} must be one of {', '.join(map(repr, _GRADIENTS))}")
    # A transform goes inside what is compiled: around it, torch.func would run the function eagerly.
    if gradient == "func":
        whole_gradient = torch.func.grad_and_value(whole, has_aux=True)
        return _first(transform.compile(whole_gradient, dynamic=False) if compile else whole_gradient)
    return _first(transform.value_and_grad(transform.compile(whole, dynamic=False) if compile else whole, has_aux=True))


def _first(gradient: Callable[..., Any]) -> Gradient:
    """Without the value that carries a graph: the detached ones are in the second half."""

    def without(*arguments: Any) -> tuple[Params, tuple[Tensor, Metrics]]:
        grads, (_, reported) = gradient(*arguments)
        return grads, reported

    return without


def _accumulated(differentiate: Gradient, parts: int) -> Gradient:
    if parts == 1:
        return differentiate

    def accumulated(learned: Params, fixed: Params, batch: Tree, keys: Key) -> tuple[Params, tuple[Tensor, Metrics]]:
        if len(keys) % parts:
            raise ValueError(f"a batch of {len(keys)} cannot be accumulated in {parts} equal parts")
        size, total = len(keys) // parts, None
        for start in range(0, len(keys), size):
            part = tree.map(lambda leaf, start=start: leaf[start : start + size], batch)
            found = differentiate(learned, fixed, part, keys[start : start + size])
            total = found if total is None else tree.map(torch.add, total, found)
        return tree.map(lambda leaf: leaf / parts, total)

    return accumulated


def flow_loss(
    config: Any,
    *,
    density: Callable[[Key, tuple[int, ...]], Tensor] = path.logit_normal,
    shift: float = 1.0,
    dropout: float = 0.0,
    empty: Tree | None = None,
    bins: int = 10,
    dtype: torch.dtype | None = None,
) -> Loss:
    """Rectified-flow loss of a whole model: params {"transformer", and any of "clip_l", "clip_g", "t5"}.

    batch: {"latents": normalised (batch, channels, height, width), and either "ids": `conditioning.Ids`, read by the
    encoders in `params` (which learn too, where they are trainable), or "context" and "pooled" computed before}.
    t is drawn from `density` and moved by `shift`. With probability `dropout` a sample's ids, or context and pooled, become
    those of the empty prompt, `empty`: one row of the same entries of the batch. `dtype` is that of the computation;
    gradients stay the parameters'. Metrics: bin_loss and bin_share (bins,), the part of the loss, and of the samples, with t
    in each of `bins` equal intervals; their quotient is the loss of an interval.
    """
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout {dropout} is a probability, between 0 and 1")
    if dropout and empty is None:
        raise ValueError(f"dropout {dropout} needs `empty`, the ids (or context and pooled) of the empty prompt")

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        params = params if dtype is None else tree.cast(params, dtype)
        batch = batch if dtype is None else tree.cast(batch, dtype)
        latents, text = batch["latents"], {name: part for name, part in batch.items() if name != "latents"}
        time_key, noise_key, drop_key = prng.split(keys, 3).unbind(-2)
        t = schedule.shift(density(time_key, ()), shift)
        noise = prng.normal(noise_key, tuple(latents.shape[1:]))
        if dropout:
            text = _dropped(text, empty, prng.bernoulli(drop_key, dropout, ()))
        if "ids" in text:
            context, pooled = conditioning.encode(params, config, text["ids"])
        else:
            context, pooled = text["context"], text["pooled"]

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return mmdit.apply(params["transformer"], config.transformer, x.to(latents.dtype), t, context, pooled)

        losses = path.loss(velocity, latents, noise, t)
        share = F.one_hot((t * bins).long().clamp(0, bins - 1), bins).to(losses.dtype)
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
) -> Loss:
    """Reconstruction + `divergence` * KL + `edges` * |difference of the gradients of the pictures|.

    batch: {"images": (batch, 3, height, width) in [-1, 1]}. `distance` is elementwise (default L1). KL(posterior || N(0, 1))
    is summed over a sample's latents and divided by its number of pixel values: the balance of Rombach et al. 2022, who
    sum both. Metrics: reconstruction, kl (nats a latent), psnr in dB, latent_mean and latent_square, from which the
    transformer's scaling and shift are set.
    """

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        params = params if dtype is None else tree.cast(params, dtype)
        images = batch["images"]
        mean, logvar = vae.encode(params, config, images if dtype is None else images.to(dtype))
        latents = mean + torch.exp(0.5 * logvar) * prng.normal(keys, tuple(mean.shape[1:]), dtype=mean.dtype)
        decoded = vae.decode(params, config, latents).to(images.dtype)
        mean, logvar = mean.float(), logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)
        reconstruction = distance(decoded, images).mean()
        total = reconstruction + divergence * kl.sum() / images.numel()
        if edges:
            total = total + edges * sum((decoded.diff(dim=d) - images.diff(dim=d)).abs().mean() for d in (-2, -1))
        squares = (decoded - images).square().flatten(1).mean(1)
        return total, {
            "reconstruction": reconstruction,
            "kl": kl.mean(),
            "psnr": (10.0 * torch.log10(4.0 / squares.clamp_min(1e-10))).mean(),
            "latent_mean": mean.mean(),
            "latent_square": mean.square().mean() + logvar.exp().mean(),
        }

    return loss
