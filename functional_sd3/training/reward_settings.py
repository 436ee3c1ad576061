"""Hyperparameters of training by rewards, and what does not go together."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from functional_sd3.training.reward_methods import METHODS, Options
from functional_sd3.training.update_rule import UpdateRule

NAMES = (*METHODS, "draft")
"""Names of all methods; "draft" alone differentiates the reward."""


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of a run.

    batch: images an update learns from, of `batch / group` prompts. draws: at most so many times as many are drawn
    until that many groups have spread. weights, default_weight: as in `rewards.total`. rate, warmup, ema, decay, clip:
    as in `tasks.Settings`. updates: gradient steps a round. lora: rank of a LoRA that is trained instead of the
    transformer. draw_dtype: of the policy that draws; None: the parameters'. at_once: images drawn at once. rows:
    points differentiated at once. spread: what advantages are divided by (`rewards.group_advantages`). rule: the
    optimiser.
    """

    method: str
    steps: int
    weights: dict[str, float] = field(default_factory=dict)
    default_weight: float = 1.0
    batch: int = 64
    group: int = 8
    draws: int = 4
    rate: float = 1e-4
    warmup: int = 0
    ema: float = 0.9
    decay: float = 1e-4
    clip: float = 1.0
    updates: int = 1
    lora: int = 0
    draw_dtype: torch.dtype | None = None
    at_once: int | None = None
    rows: int = 64
    spread: Literal["batch", "group", "none"] = "batch"
    options: Options = Options()
    rule: UpdateRule = UpdateRule()


def check(settings: Settings) -> None:
    """Raises ValueError for a method that there is not, groups that do not make up the batch, and numbers below 1."""
    if settings.method not in NAMES:
        raise ValueError(f"method {settings.method!r} must be one of {', '.join(NAMES)}")
    if settings.group < 2:
        raise ValueError(f"group {settings.group} must be at least 2: an image is compared with others of its prompt")
    if settings.group > settings.batch:
        raise ValueError(
            f"group {settings.group} is larger than the batch of {settings.batch} images: an update takes whole groups"
        )
    numbers = {"draws": settings.draws, "updates": settings.updates, "rows": settings.rows}
    for name, number in {**numbers, "at_once": 1 if settings.at_once is None else settings.at_once}.items():
        if number < 1:
            raise ValueError(f"{name} {number} must be at least 1")
    if settings.batch % settings.group:
        raise ValueError(f"batch {settings.batch} must be a multiple of the group, {settings.group} images a prompt")
