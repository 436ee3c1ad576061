"""Rewards of images: `(images in [0, 1], prompts, facts) -> {name: (batch,)}`, their weights, advantages of a group."""

from functional_sd3.training.rewards.advantages import group_advantages, has_spread
from functional_sd3.training.rewards.functions import from_name, psnr
from functional_sd3.training.rewards.types import Reward, RewardError, Scores, check_scores, checked, combined, total

__all__ = [
    "Reward",
    "RewardError",
    "Scores",
    "check_scores",
    "checked",
    "combined",
    "from_name",
    "group_advantages",
    "has_spread",
    "psnr",
    "total",
]
