"""The type of a reward, the check of what one returns, and the weighted sum of several."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core.checks import function_name
from functional_sd3.formats.printable import shorten

Scores = dict[str, Tensor]
"""Scores of a batch of images by name, each (batch,)."""
Reward = Callable[[Tensor, Sequence[str], Sequence[Any]], Mapping[str, Tensor]]
"""`(images (batch, 3, height, width) in [0, 1], prompts, facts) -> scores`; facts: data of the source of the prompts
for each beside its text, such as the scene that it describes, or None."""


class RewardError(ValueError):
    """A reward that raised, or returned no finite number for each image; the message names it."""


def check_scores(name: str, scores: Any, prompts: Sequence[str]) -> Scores:
    """The scores that the reward `name` returned, float32 on their device; a bare tensor is the score `name`.

    Raises RewardError, naming the score, unless they are a mapping of names to tensors (batch,) of finite numbers.
    """
    count = len(prompts)
    if isinstance(scores, Tensor):
        scores = {name: scores}
    if not isinstance(scores, Mapping) or not scores:
        kind = type(scores).__name__
        raise RewardError(f"reward {name} returned {kind}; it must return {{name: tensor ({count},)}}, at least one")
    checked = {}
    for key, score in scores.items():
        what = f"reward {name}: its score {shorten(repr(key))}"
        if not isinstance(key, str) or not key:
            raise RewardError(f"{what} must have a text as its name")
        if not isinstance(score, Tensor):
            raise RewardError(f"{what} is {type(score).__name__}; it must be a tensor ({count},), a number an image")
        if tuple(score.shape) != (count,):
            raise RewardError(f"{what} has shape {list(score.shape)}; it must be ({count},), one number an image")
        if score.is_complex():
            raise RewardError(f"{what} is {score.dtype}; it must be of real numbers")
        # Cast before the check, as float64 values beyond float32 become infinite.
        score = score.to(torch.float32)
        bad = (~torch.isfinite(score)).nonzero().flatten().tolist()
        if bad:
            value, prompt = float(score[bad[0]]), shorten(repr(prompts[bad[0]]), 200)
            raise RewardError(f"{what} is {value} for {len(bad)} of {count} images, the first of the prompt {prompt}")
        checked[key] = score
    return checked


def combined(rewards: Mapping[str, Reward]) -> Reward:
    """All scores of several rewards by name, each checked (`check_scores`).

    Each reward gets images and lists of its own, which it may change. An exception of a reward becomes a RewardError
    that names it. Raises RewardError where two rewards give a score of the same name.
    """

    def reward(images: Tensor, prompts: Sequence[str], facts: Sequence[Any]) -> Scores:
        scores: Scores = {}
        for name, one in rewards.items():
            try:
                returned = one(images.clone(), list(prompts), list(facts))
            except RewardError:
                raise
            except (Exception, SystemExit) as error:  # An exit would lose the run's steps.
                raise RewardError(f"reward {name} raised {type(error).__name__}: {error}") from error
            checked = check_scores(name, returned, prompts)
            if twice := scores.keys() & checked.keys():
                raise RewardError(f"two rewards give the score {', '.join(sorted(twice))}; leave one of them out")
            scores |= checked
        return scores

    return reward


def checked(reward: Reward) -> Reward:
    """A reward whose errors, and what it returns, are treated as by `combined`, under its own name."""
    return combined({function_name(reward): reward})


def total(scores: Mapping[str, Tensor], weights: Mapping[str, float], default: float = 0.0) -> Tensor:
    """Weighted sum of scores, (batch,); one that `weights` does not name weighs `default`.

    Raises RewardError for a weight whose score is missing, where no score has a weight, and for a sum that is too large
    for float32.
    """
    if absent := [name for name in weights if name not in scores]:
        known = ", ".join(scores)
        raise RewardError(f"no reward gives the score {', '.join(absent)}, which has a weight; there are: {known}")
    each = {name: weights.get(name, default) for name in scores}
    if not any(each.values()) or not all(map(math.isfinite, each.values())):
        raise RewardError(f"the weights {each} must be finite numbers, one of them not 0")
    summed = torch.stack([weight * scores[name] for name, weight in each.items() if weight]).sum(0)
    if not torch.isfinite(summed).all():
        raise RewardError(
            f"the sum of the scores with the weights {each} is too large for float32: give smaller weights"
        )
    return summed
