"""Methods of training by rewards: sampling policy, batch of the rollouts, objective, decay of the slow copy."""

from collections.abc import Callable
from typing import Any

from functional_sd3.training.reward_methods.matching import awm_method, draw_points, nft_method
from functional_sd3.training.reward_methods.policy import FORMS, grpo_method
from functional_sd3.training.reward_methods.preference import dpo_method, noised_pairs
from functional_sd3.training.reward_methods.types import Options, Policies, RewardMethod, Sampler

METHODS: dict[str, Callable[[Any, Options, Sampler], RewardMethod]] = {
    "nft": nft_method,
    "awm": awm_method,
    "grpo": grpo_method,
    "dpo": dpo_method,
}
"""Methods that learn from drawn and rewarded images, by name."""

__all__ = [
    "FORMS",
    "METHODS",
    "Options",
    "Policies",
    "RewardMethod",
    "Sampler",
    "awm_method",
    "dpo_method",
    "draw_points",
    "grpo_method",
    "nft_method",
    "noised_pairs",
]
