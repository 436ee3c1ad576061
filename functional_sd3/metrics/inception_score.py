"""Inception score: confidence of the predicted class of each image and diversity of the classes of all.

Salimans et al. 2016, "Improved Techniques for Training GANs", section 4: exp(E_x KL(p(y|x) || p(y))).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key


class InceptionScore(NamedTuple):
    """Mean and population standard deviation over the splits; between 1 and the number of classes."""

    mean: float
    deviation: float


def score(logits: Tensor, *, splits: int = 10, key: Key | None = None) -> InceptionScore:
    """The score of logits (n, classes); by convention Inception's without the bias, `inception.unbiased`.

    splits: parts of nearly equal size that are scored one by one; their size matters (Barratt and Sharma 2018). key:
    shuffles the images first, for sets that are sorted by class. Raises ValueError with fewer images than splits.
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}; they must be floating, (images, classes)")
    if not 1 <= splits <= len(logits):
        raise ValueError(f"{len(logits)} images cannot be scored in {splits} splits")
    if key is not None:
        logits = logits[prng.permutation(key, len(logits)).to(logits.device)]
    bounds = [index * len(logits) // splits for index in range(splits + 1)]
    scores = torch.stack([_part(logits[bounds[i] : bounds[i + 1]].double()) for i in range(splits)])
    return InceptionScore(float(scores.mean()), float(scores.std(correction=0)))


def _part(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    ratio = log_p - p.mean(0).log()
    # A probability of 0 contributes nothing: the limit of p log p, not 0 times infinity.
    return torch.where(p > 0, p * ratio, 0.0).sum(1).mean().exp()
