"""A second copy of trained parameters that follows them slowly: the old policy of rewards, the teacher of a student."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import leafwise, prng, tree
from functional_sd3.core.rounding import Positions, Rounding
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.training import optim
from functional_sd3.training.following import Following
from functional_sd3.training.objectives import Metrics
from functional_sd3.training.schedules import Schedule
from functional_sd3.training.step import TrainState


class _PairFields(NamedTuple):
    train: TrainState
    old: Params
    step: Tensor


class PairState(Following, _PairFields):
    """State of a run with a slow copy: the `TrainState`, the copy of its parameters, rounds done (int64 ()).

    A round is one batch and one or several updates on it, which `train.step` counts.
    """

    __slots__ = ()


def init(train: TrainState) -> PairState:
    """The state before the first round: the copy is the parameters."""
    old = tree.map(lambda leaf: leaf.detach().clone(memory_format=torch.contiguous_format), train.params)
    return PairState(train, old, torch.zeros_like(train.step))


def soft_update(old: Params, new: Params, decay: Tensor, rounding: Rounding | None = None) -> Params:
    """decay old + (1 - decay) new; decay () from 0 (the new) to 1 (the old). rounding: of leaves in bfloat16, which
    would hardly move where they are rounded to nearest."""
    if rounding is not None:
        return optim.average(old, new, 1 - decay, rounding)
    ends = iter(leafwise.lerp(tree.leaves(old), tree.leaves(new), 1 - decay))
    return tree.map(lambda leaf: next(ends), old)


def linear(rate: float, most: float, start: int = 0) -> Schedule:
    """Decay of the copy after `n` rounds: min(rate (n - start), most), 0 before `start`."""
    return lambda step: ((step - start).float() * rate).clamp(0.0, most)


def renewed(every: int) -> Schedule:
    """Decay of a copy that becomes the parameters after each `every` rounds, and stays as it is in between."""
    if every < 1:
        raise ValueError(f"every {every} must be at least 1 round")
    return lambda step: (step % every != 0).float()


class Round(NamedTuple):
    """The batch of a round, or None where no group has spread, and the metrics of its rollout."""

    batch: Tree | None
    metrics: Metrics


def make_round_step(
    update: Callable[[TrainState, Tree], tuple[TrainState, Metrics]],
    decay: Schedule,
    *,
    updates: int = 1,
    names: Sequence[str] = (),
    positions: Mapping[str, Positions] | None = None,
) -> Callable[[PairState, Round], tuple[PairState, dict[str, Any]]]:
    """`round_step(state, round) -> (state, metrics)`: `updates` steps of `update` on the batch, then the copy's.

    update: of `step.make_train_step`. decay: of `soft_update`, by the number of rounds done, this one included. The
    metrics are those of the last update and of the round. A round without a batch changes nothing but the count; its
    loss and gradient are 0, and the metrics of `names`, those of the objective, are NaN: not measured. positions: of
    leaves of which this process has a part (`sharding.positions`), for a copy in bfloat16, which is rounded
    stochastically; None for one in float32.
    """
    if updates < 1:
        raise ValueError(f"updates {updates} must be at least 1")

    def round_step(state: PairState, rollout: Round) -> tuple[PairState, dict[str, Any]]:
        train, done = state.train, state.step + 1
        if rollout.batch is None:
            zero = torch.zeros((), dtype=torch.float32, device=done.device)
            unmeasured = dict.fromkeys(names, math.nan)
            return PairState(train, state.old, done), {"loss": zero, "grad_norm": zero, **unmeasured, **rollout.metrics}
        for _ in range(updates):
            train, metrics = update(train, rollout.batch)
        with torch.no_grad():
            rounding = None if positions is None else Rounding(_rounding_key(train.key, done), positions)
            old = soft_update(state.old, train.params, decay(done), rounding)
        return PairState(train, old, done), {**metrics, **rollout.metrics}

    return round_step


def _rounding_key(key: Key, rounds: Tensor) -> Key:
    """Key by which a round's copy is rounded: of no sample and no step, as no run reaches step 2^32 - 2, the number
    folded in."""
    return prng.fold_in(prng.fold_in(key, 2**32 - 2), rounds)
