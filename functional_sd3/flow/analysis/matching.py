"""Flow-matching losses of data under conditions: a zero-shot classifier, cheaper than a likelihood and not one.

Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot Classifier", arXiv:2303.16203: of several conditions the
one of least expected error is the likeliest, if all are evaluated with the same noise at the same times.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key, Velocity
from functional_sd3.flow import path


def losses(
    velocity: Velocity,
    x0: Tensor,
    key: Key,
    *,
    draws: int = 32,
    on_draw: Callable[[int], Any] | None = None,
) -> Tensor:
    """Flow-matching losses, (draws, batch): the mean square of v(x_t, t) - (noise - x0) over a sample's elements.

    Their mean over the draws is the rectified-flow loss for t ~ U[0, 1].

    x0 (batch, ...); key: (2,), from which sample i takes fold_in(key, i), or (batch, 2): samples that share a key share
    noise and times, so that their losses may be compared draw by draw. Draw k has its t in the k-th of `draws` equal
    parts of [0, 1] (stratified), so the spread over the draws overstates the error of the mean. on_draw: called
    with the number of each draw after it. One evaluation of the velocity a draw.

    Raises ValueError for draws below 1 and keys of another number than samples.
    """
    if draws < 1:
        raise ValueError(f"draws {draws} must be at least 1")
    keys = prng.sample_keys(key, len(x0))
    losses_of_draws = []
    for index in range(draws):
        time_key, noise_key = prng.split(prng.fold_in(keys, index)).unbind(-2)
        t = (index + prng.uniform(time_key)) / draws
        losses_of_draws.append(path.loss(velocity, x0, prng.normal(noise_key, tuple(x0.shape[1:])).to(x0), t.to(x0)))
        if on_draw is not None:
            on_draw(index)
    return torch.stack(losses_of_draws)


def advantage(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Score of the best condition minus that of each, and the standard error of the difference, both (conditions,).

    scores (draws, conditions), higher is better, the same draws for all: differences are taken draw by draw, so that
    what is common to the conditions cancels. The error is NaN for a single draw, and 0 for the best.
    """
    best = scores[:, scores.mean(0).argmax()]
    differences = best[:, None] - scores
    error = standard_error(differences)
    return differences.mean(0), torch.where((differences == 0).all(0), 0.0, error)


def standard_error(draws: Tensor) -> Tensor:
    """Standard error of the mean over the first dimension: the deviation / sqrt(draws); NaN for a single draw."""
    if len(draws) == 1:
        return torch.full_like(draws[0], torch.nan)
    return draws.std(0) / math.sqrt(len(draws))
