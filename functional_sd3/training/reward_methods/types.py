"""Types of the methods of training by rewards, and their hyperparameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training.objectives import Loss
from functional_sd3.training.rollouts import Draw
from functional_sd3.training.schedules import Schedule
from functional_sd3.transformer.mmdit import AttendBlocks


class Sampler(NamedTuple):
    """Sampler of the images of a round.

    draw: as in `rollouts`, giving "latents". noise: keys (batch, 2) -> the starting noise. times (steps + 1,): the grid
    that `draw` follows. negative: conditioning of the empty prompt, (1, ...) each. cfg: its scale, 1 for none.
    """

    draw: Draw
    noise: Callable[[Key], Tensor]
    times: Tensor
    negative: Conditioning
    cfg: float = 1.0


@dataclass(frozen=True)
class Options:
    """Hyperparameters of the methods; None: the default of the method, as published.

    group: images a prompt. times: sampling times that every image is trained at (nft, awm, dpo). kl: weight of the
    distance to the start. beta: of `nft_loss` or `dpo_loss`. form, noise, window, eps: of the ratio objective
    (`policy.FORMS`), window 0 for all steps. guided: whether "nft" trains the velocity with the sampler's guidance
    and not that of the prompts alone. last: steps that `draft_loss` differentiates. updates: gradient steps a round.
    rows: points whose velocities are computed at once. dtype: of the computation, None for the parameters'. attend: as
    of `mmdit.apply`, of all velocities that are compared; the images are drawn by the `Sampler`'s own.
    """

    group: int = 8
    times: int = 2
    kl: float | None = None
    beta: float | None = None
    form: str = "flow"
    noise: float | None = None
    window: int | None = None
    eps: float | None = None
    guided: bool = False
    last: int = 1
    updates: int = 1
    rows: int = 64
    dtype: torch.dtype | None = None
    attend: AttendBlocks | None = None


class Policies(NamedTuple):
    """Parameters of three whole models: at the start, the slow copy's and the trained ones."""

    start: Params
    old: Params
    current: Params


class RewardMethod(NamedTuple):
    """A method that trains a policy on images and their advantages.

    draws_from: the policy that draws. decay: of the slow copy (`copies.soft_update`), by rounds done. drawing: (number
    of the round, key) -> how its images are drawn. batch: (key, rows of a rollout, policies) -> batch of the loss.
    metrics: names of the loss's. same_noise: the images of a prompt start from one noise.
    """

    loss: Loss
    metrics: tuple[str, ...]
    draws_from: Literal["old", "current"]
    decay: Schedule
    drawing: Callable[[int, Key], Draw]
    batch: Callable[[Key, Tree, Policies], Tree]
    same_noise: bool = False


def given(value: float | None, default: float) -> float:
    """The value, or the default where it is None."""
    return default if value is None else value
