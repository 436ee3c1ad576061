"""Optimisers as values: `init(params) -> state`, `update(grads, state, params) -> (updates, state)`, joined by `chain`.

The shape of optax on PyTorch trees. Updates are added to the parameters, so a descent step is negative. Everything is
pure but `donate`, which updates in place.
"""

from functional_sd3.training.donation import check_donated, poison
from functional_sd3.training.optim.adam import AdamState, adamw, scale_by_adam
from functional_sd3.training.optim.adam8 import adamw8bit, scale_by_adam8bit
from functional_sd3.training.optim.compose import chain, masked, partitioned
from functional_sd3.training.optim.transforms import (
    add_decayed_weights,
    clip_by_global_norm,
    scale_by_learning_rate,
    scale_by_schedule,
)
from functional_sd3.training.optim.types import (
    CountState,
    Optimizer,
    ScaledGradients,
    global_norm,
    leafwise_rule,
    sharded_rule,
    zeros_like,
)
from functional_sd3.training.optim.updates import apply_updates, average, donate, ema_decay, ema_update
from functional_sd3.training.schedules import Schedule, constant, trapezoid, warmup_constant, warmup_cosine

__all__ = [
    "AdamState",
    "CountState",
    "Optimizer",
    "ScaledGradients",
    "Schedule",
    "adamw",
    "adamw8bit",
    "add_decayed_weights",
    "apply_updates",
    "average",
    "chain",
    "check_donated",
    "clip_by_global_norm",
    "constant",
    "donate",
    "ema_decay",
    "ema_update",
    "global_norm",
    "leafwise_rule",
    "masked",
    "partitioned",
    "poison",
    "scale_by_adam",
    "scale_by_adam8bit",
    "scale_by_learning_rate",
    "scale_by_schedule",
    "sharded_rule",
    "trapezoid",
    "warmup_constant",
    "warmup_cosine",
    "zeros_like",
]
