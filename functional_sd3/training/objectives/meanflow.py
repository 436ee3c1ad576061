"""MeanFlow: a network u(x, t, r) learns the mean of the flow's velocity over [r, t], and so to draw in one step.

Geng et al. 2025, arXiv:2505.13447 (MeanFlow), and arXiv:2512.02012 (improved MeanFlow). x_t = (1 - t) x_0 + t noise, as
everywhere here. The mean velocity obeys u = v - (t - r) du/dt with du/dt = (d_x u) v + d_t u along the flow, and is
regressed onto the right side, in which u is the network's own, without gradients. The derivative is one forward-mode
product of the frozen network, before and apart from the step: it leaves no graph, so that a step takes the memory of
plain training.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import computation, prng, tree
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key, MeanVelocity, Params, Tree
from functional_sd3.flow import path, schedule
from functional_sd3.training.objectives import points
from functional_sd3.training.objectives.segments import Teacher, normalised
from functional_sd3.training.objectives.types import Loss, Metrics, check_keys
from functional_sd3.transformer import mmdit

Density = Callable[[Key, tuple[int, ...]], Tensor]
"""Draws times (..., *shape) from keys (..., 2), such as `path.logit_normal`."""
MeanVelocityOf = Callable[[Params, Tree], MeanVelocity]
"""`(params, rows of a batch without "latents") -> u(x, t, r)`."""
METRICS = ("error", "tangent")


def logit_normal(key: Key, shape: tuple[int, ...]) -> Tensor:
    """t = sigmoid(n), n ~ N(-0.4, 1): the times of MeanFlow (arXiv:2505.13447, section 4.3)."""
    return path.logit_normal(key, shape, mean=-0.4)


def meanflow_loss(
    network: Any,
    *,
    teacher: Teacher | None = None,
    omega: float = 1.0,
    kappa: float = 0.0,
    guided: tuple[float, float] = (0.0, 1.0),
    dropout: float = 0.0,
    empty: Tree | None = None,
    equal: float = 0.75,
    density: Density = logit_normal,
    shift: float = 1.0,
    along: Literal["target", "predicted"] = "target",
    head: points.VelocityOf | None = None,
    power: float = 1.0,
    offset: float = 1e-2,
    time_difference: float | None = 0.01,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "sdpa",
    attend: mmdit.AttendBlocks | None = None,
) -> Loss:
    """mean w |u(x_t, t, r) - sg(v - (t - r) du/dt)|^2 with w = sg(1 / (|.|^2 + offset)^power), |.|^2 a sample's mean.

    network: the config of a whole model whose transformer has `interval_size`, or any other `MeanVelocityOf`. batch:
    {"latents": normalised (batch, ...), "context", "pooled"}, or for another network what that reads in their place;
    and where it has "tangent" (batch,) that factor of du/dt, to warm it up.

    v: of the teacher, guidance included, without gradients; without a teacher noise - x_0, guided by the network
    itself: omega (noise - x_0) + kappa u(x, t, t | prompt) + (1 - omega - kappa) u(x, t, t | empty prompt) at times
    `guided`, which folds in the scale omega / (1 - kappa). empty: one row of what the network reads; with probability
    `dropout` a sample has it in place of its prompt, unguided.
    equal: share of the samples that have r = t, where this is the flow's own objective and needs no derivative: those
    whose index i has floor((i + 1) equal) > floor(i equal), whatever their keys. Of the others t is the larger and r
    the smaller of two draws of `density`, moved by `shift`.
    along: the direction of the derivative: "target" is v (MeanFlow), "predicted" the network's own u(x, t, t) (improved
    MeanFlow, where du/dt does not depend on the draw of x_0 and the noise). head: another prediction of the velocity
    at one time, `(params, batch) -> velocity`, along which the derivative is taken instead; it learns v beside u.
    time_difference: as in `mmdit.apply`, in the derivative. dtype, implementation, attend: as in `flow_loss`; the
    derivative is computed in the parameters' dtype, as bfloat16 is too coarse for it. These four are for the network of
    a config.
    keys (batch, 2). Metrics: error, mean |.|^2, and tangent, the root mean square of (t - r) du/dt where r < t.

    Raises ValueError for a model without `interval_size`, and for options that contradict one another.
    """
    mixing = Mixing(omega, kappa, guided, empty)
    _check(teacher, mixing, dropout, equal, along, head)
    network_of = partial(as_network, network, "meanflow_loss", implementation=implementation, attend=attend)
    u_of, frozen_u_of, smooth_u_of = network_of(dtype=dtype), network_of(), network_of(time_difference=time_difference)

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        latents, text = split_batch(network, batch, "meanflow_loss")
        check_keys(keys, latents)
        time_key, noise_key, drop_key = prng.split(keys, 3).unbind(-2)
        rows = unequal_rows(len(latents), equal, latents.device)
        t, r = (time.to(latents) for time in draw_interval(time_key, density, shift, rows))
        noise = prng.normal(noise_key, tuple(latents.shape[1:])).to(latents)
        x = path.interpolate(latents, noise, t)
        is_free = prng.bernoulli(drop_key, dropout, ()) if dropout else torch.zeros_like(t, dtype=torch.bool)
        text = _replace_rows(text, empty, is_free) if dropout and empty is not None else text
        frozen = tree.map(lambda leaf: leaf.detach(), params)
        with torch.no_grad():
            if teacher is None:
                v = _self_guided(partial(frozen_u_of, frozen), mixing, text, x, t, path.target(latents, noise), is_free)
            else:
                v = teacher(text)(x, t).to(x.dtype)
            part = {name: leaf[rows] for name, leaf in text.items()}
            at = x[rows], t[rows], r[rows]
            direction = v[rows]
            if head is not None:
                direction = head(frozen, part)(*at[:2]).to(x.dtype)
            elif along == "predicted":
                direction = frozen_u_of(frozen, part)(at[0], at[1], at[1])
            change = path.broadcast(at[1] - at[2], x) * derivative(smooth_u_of(frozen, part), *at, direction)
            if "tangent" in batch:
                change = path.broadcast(batch["tangent"][rows], x) * change
            target = v.index_add(0, rows, -change)
        error = points.sample_means((u_of(params, text)(x, t, r) - target).square())
        value = normalised(error, offset, power).mean()
        if head is not None:
            head_error = points.sample_means((head(params, text)(x, t) - v).square())
            value = value + normalised(head_error, offset, power).mean()
        tangent = change.square().mean().sqrt() if len(rows) else error.new_zeros(())
        return value, {"error": error.mean(), "tangent": tangent}

    return loss


class Mixing(NamedTuple):
    """Guidance by the network itself: weights, first and last time, and conditioning of the empty prompt."""

    omega: float = 1.0
    kappa: float = 0.0
    guided: tuple[float, float] = (0.0, 1.0)
    empty: Tree | None = None

    @property
    def free(self) -> float:
        """Weight of the velocity of the empty prompt."""
        return 1 - self.omega - self.kappa


def as_network(network: Any, what: str, **options: Any) -> MeanVelocityOf:
    """The network as it is, or that of a config (`model_mean_velocity`).

    Raises ValueError for a config whose transformer has no input for t - r, naming the objective `what`.
    """
    if callable(network):
        return network
    if not network.transformer.interval_size:
        raise ValueError(
            f"{what} trains a mean velocity u(x, t, r), and this model's config has no interval_size: replace it, such "
            "as by 64, and add the parameters (`learner.extended`)"
        )
    return model_mean_velocity(network, **options)


def split_batch(network: Any, batch: Tree, what: str) -> tuple[Tensor, Tree]:
    """Latents in float32 at least, and what the network reads beside them. Raises ValueError for a batch that lacks an
    entry."""
    points.check_batch(batch, ("latents",) if callable(network) else ("latents", "context", "pooled"), what)
    is_read = {"context", "pooled"} if not callable(network) else batch.keys() - {"latents", "tangent"}
    return points.wide_latents(batch), {name: part for name, part in batch.items() if name in is_read}


def model_mean_velocity(
    config: Any,
    *,
    time_difference: float | None = None,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "sdpa",
    attend: mmdit.AttendBlocks | None = None,
) -> MeanVelocityOf:
    """The mean velocity of the prompts of a batch, unguided, in float32: as `points.model_velocity` of one time."""

    def mean_velocity_of(params: Params, batch: Tree) -> MeanVelocity:
        weights, context, pooled = params["transformer"], batch["context"], batch["pooled"]
        weights, computed = computation.cast(weights, computation.of(config, "transformer"), dtype)
        if dtype is not None:
            context, pooled = context.to(dtype), pooled.to(dtype)

        def mean_velocity(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            u = mmdit.apply(
                weights, config.transformer, x if dtype is None else x.to(dtype), t, context, pooled, interval=t - r,
                time_difference=time_difference, implementation=implementation, attend=attend,
                **computed.options,
            )  # fmt: skip
            return u.to(torch.promote_types(x.dtype, torch.float32))

        return mean_velocity

    return mean_velocity_of


def derivative(u: MeanVelocity, x: Tensor, t: Tensor, r: Tensor, direction: Tensor) -> Tensor:
    """du/dt = (d_x u) direction + d_t u at fixed r, by forward mode: no graph, and memory for one evaluation or two."""
    if not len(x):
        return torch.zeros_like(x)
    return torch.func.jvp(lambda x, t: u(x, t, r), (x, t), (direction, torch.ones_like(t)))[1]


def draw_interval(keys: Key, density: Density, shift: float, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(t, r) of each sample, (batch,): t the larger of two draws, r the smaller in `rows`, t in the others."""
    draws = schedule.shift(density(keys, (2,)), shift)
    t, smaller = draws.amax(-1), draws.amin(-1)
    return t, t.index_copy(0, rows, smaller[rows])


def unequal_rows(batch: int, equal: float, device: torch.device) -> Tensor:
    """Indices of the samples of a batch that have r < t: all but a share `equal`, evenly spread."""
    rows = [row for row in range(batch) if int((row + 1) * equal + 1e-9) == int(row * equal + 1e-9)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _replace_rows(text: Tree, empty: Tree, where: Tensor) -> Tree:
    """The conditioning with that of the empty prompt where `where` (batch,) is True."""
    return {
        name: torch.where(where.reshape(-1, *(1,) * (leaf.ndim - 1)), empty[name].to(leaf), leaf)
        for name, leaf in text.items()
    }


def _self_guided(
    u_of: Callable[[Tree], MeanVelocity],
    mixing: Mixing,
    text: Tree,
    x: Tensor,
    t: Tensor,
    v: Tensor,
    is_free: Tensor,
) -> Tensor:
    """The velocity v with MeanFlow's guidance (arXiv:2505.13447, equations 19 and 21), but where `is_free`."""
    if mixing.omega == 1 and not mixing.kappa:
        return v
    mixed = mixing.omega * v
    if mixing.kappa:
        mixed = mixed + mixing.kappa * u_of(text)(x, t, t)
    if mixing.free and mixing.empty is not None:
        blank = {name: mixing.empty[name].to(leaf).expand_as(leaf) for name, leaf in text.items()}
        mixed = mixed + mixing.free * u_of(blank)(x, t, t)
    first, last = mixing.guided
    return torch.where(path.broadcast((t >= first) & (t <= last) & ~is_free, x), mixed, v)


def _check(
    teacher: Teacher | None, mixing: Mixing, dropout: float, equal: float, along: str, head: points.VelocityOf | None
) -> None:
    if not 0 <= equal <= 1 or not 0 <= dropout <= 1:
        raise ValueError(f"equal {equal} and dropout {dropout} are shares of the samples, between 0 and 1")
    if along not in ("target", "predicted"):
        raise ValueError(f"along {along!r} must be 'target' or 'predicted'")
    if head is not None and along != "target":
        raise ValueError("head is the direction of the derivative: leave out along")
    if teacher is not None and (mixing.omega, mixing.kappa, dropout) != (1.0, 0.0, 0.0):
        raise ValueError("omega, kappa and dropout are for learning from data: a teacher is guided already")
    if mixing.empty is None and (dropout or abs(mixing.free) > 1e-12):
        raise ValueError("dropout, and omega + kappa other than 1, need `empty`, the conditioning of the empty prompt")
    if not mixing.kappa < 1:
        raise ValueError(f"kappa {mixing.kappa} must be below 1: the scale of guidance is omega / (1 - kappa)")
