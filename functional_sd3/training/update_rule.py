"""Update rule of a run's parameters: its optimiser by name, the dtype of the weights, updates in the backward
pass."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Tree
from functional_sd3.training import fused, muon, objectives, optim, step


@dataclass(frozen=True)
class UpdateRule:
    """optimizer: a name of `OPTIMIZERS`. weights: dtype of the parameters that learn; bfloat16 ones, and their
    averages, are rounded stochastically. fused: each parameter is updated in the backward pass, without clipping."""

    optimizer: str = "adamw"
    weights: torch.dtype = torch.float32
    fused: bool = False


def optimizer(
    rule: UpdateRule,
    rate: float | optim.Schedule,
    *,
    clip: float,
    decay: float,
    b2: float = 0.999,
    groups: Mapping[str, optim.Schedule] | None = None,
) -> optim.Optimizer:
    """The optimiser of a run: clipped to a global norm (not where updates are fused), decay of matrices alone.

    groups: the rates of parts of the parameters, by the first name of their paths, that have their own. Raises
    ValueError for a name that is not in `OPTIMIZERS`.
    """
    if rule.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {rule.optimizer!r} must be one of {', '.join(OPTIMIZERS)}")
    named = OPTIMIZERS[rule.optimizer](rate, decay, b2)
    if groups:
        parts = {name: OPTIMIZERS[rule.optimizer](own, decay, b2) for name, own in groups.items()}
        named = optim.partitioned({"others": named, **parts}, lambda path, _: _group(path, parts))
    return optim.chain(named) if rule.fused else optim.chain(optim.clip_by_global_norm(clip), named)


def rounding(rule: UpdateRule) -> Literal["nearest", "stochastic"]:
    """Rounding of parameters and averages (`step.make_train_step`)."""
    return "stochastic" if rule.weights == torch.bfloat16 else "nearest"


def train_step(
    rule: UpdateRule,
    loss: objectives.Loss,
    optimizer: optim.Optimizer,
    rate: optim.Schedule,
    *,
    trainable: tree.Chooser,
    ema_decay: float,
    **options: Any,
) -> Callable[[Any, Tree], tuple[Any, objectives.Metrics]]:
    """`step.make_train_step` of a run, in place; options: its others, for updates that are not fused."""
    common: dict[str, Any] = {"trainable": trainable, "ema_decay": ema_decay, "rate": rate}
    common["rounding"] = rounding(rule)
    if not rule.fused:
        return step.make_train_step(loss, optimizer, donate=True, **common, **options)
    if options.get("accumulate", 1) > 1 or options.get("rows") or options.get("compile"):
        raise ValueError("fused updates need the whole batch at once, and are not compiled: accumulate, rows, compile")
    on_mesh = {name: options[name] for name in ("mesh", "layout", "own_rows") if name in options}
    return fused.make_fused_step(loss, optimizer, **common, **on_mesh)


def is_matrix(path: str, leaf: Tensor) -> bool:
    """True for what weight decay is for: no biases, norms and other vectors, and not those of a new word."""
    return leaf.ndim >= 2 and path.partition(".")[0] != "word"


def _group(path: str, groups: Collection[str]) -> str:
    first = path.partition(".")[0]
    return first if first in groups else "others"


def is_hidden(path: str, leaf: Tensor) -> bool:
    """True for the matrices inside blocks, which Muon is for."""
    return leaf.ndim >= 2 and "blocks" in path.split(".")


def _adamw(rate: float | optim.Schedule, decay: float, b2: float) -> optim.Optimizer:
    return optim.adamw(rate, b2=b2, decay=decay, mask=is_matrix)


def _adamw8bit(rate: float | optim.Schedule, decay: float, b2: float) -> optim.Optimizer:
    return optim.adamw8bit(rate, b2=b2, decay=decay, mask=is_matrix)


def _muon(rate: float | optim.Schedule, decay: float, b2: float) -> optim.Optimizer:
    """Muon for the matrices inside blocks, AdamW for the rest, at one rate (arXiv:2502.16982, equation 4)."""
    matrices = optim.chain(muon.scale_by_muon(), optim.add_decayed_weights(decay), optim.scale_by_learning_rate(rate))
    rules = {"muon": matrices, "adamw": _adamw(rate, decay, b2)}
    return optim.partitioned(rules, lambda path, leaf: "muon" if is_hidden(path, leaf) else "adamw")


OPTIMIZERS: dict[str, Callable[[float | optim.Schedule, float, float], optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "muon": _muon,
}
"""Name -> (rate, weight decay, b2) -> optimiser."""
