"""Advantages of images within the group of their prompt (Shao et al. 2024, arXiv:2402.03300, "DeepSeekMath", GRPO)."""

from typing import Literal

import torch
from torch import Tensor

CLIP = 5.0
"""Largest absolute advantage: flow_grpo, DiffusionNFT and AWM all clip there."""
_EPS = 1e-4


def group_advantages(
    rewards: Tensor, *, scale: Literal["batch", "group", "none"] = "batch", clip: float = CLIP
) -> Tensor:
    """(reward - mean of its group) / (std + 1e-4), clipped to +-`clip`: rewards (groups, size) -> (groups, size).

    scale: the standard deviation of the whole batch (Liu et al. 2025, arXiv:2505.05470, as their code has it), that of
    each group (GRPO), or none. Raises ValueError for groups of fewer than two images, which have no spread.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards {list(rewards.shape)} must be (groups, size), size at least 2")
    centred = rewards - rewards.mean(1, keepdim=True)
    # A group of equal rewards has exactly no advantage, whatever its mean was rounded to.
    centred = torch.where(has_spread(rewards)[:, None], centred, 0.0)
    if scale == "none":
        return centred.clamp(-clip, clip)
    if scale not in ("batch", "group"):
        raise ValueError(f"scale {scale!r} must be 'batch', 'group' or 'none'")
    std = rewards.std() if scale == "batch" else rewards.std(1, keepdim=True)
    return (centred / (std + _EPS)).clamp(-clip, clip)


def has_spread(rewards: Tensor) -> Tensor:
    """True for the groups whose rewards differ: rewards (groups, size) -> bool (groups,)."""
    return rewards.amax(1) > rewards.amin(1)
