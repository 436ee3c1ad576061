"""Improved precision and recall: the share of generated samples within the real manifold, and the converse.

Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models", equation 1. The paper
uses features of VGG-16; torch-fidelity and most later work use those of Inception.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.metrics import neighbours


class PrecisionRecall(NamedTuple):
    """Improved precision and recall, both in [0, 1]."""

    precision: float
    recall: float


def score(real: Tensor, generated: Tensor, *, neighbour: int = 3) -> PrecisionRecall:
    """Precision and recall of features real (n, d) and generated (m, d).

    precision: the share of generated samples within the ball around some real sample that reaches to that one's
    `neighbour`-th nearest real one, border included; recall: the same with the roles exchanged. Raises ValueError for
    dimensions that differ, NaN, or too few samples. Time grows with the square of the samples, memory does not.
    """
    neighbours.check(real, generated, neighbour)
    real_radii, generated_radii = neighbours.radii(real, neighbour), neighbours.radii(generated, neighbour)
    recalled, precise = [], torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    start = 0
    for block in neighbours.blocks(real, generated):
        recalled.append((block <= generated_radii).any(1))
        precise = precise | (block <= real_radii[start : start + len(block), None]).any(0)
        start += len(block)
    return PrecisionRecall(float(precise.double().mean()), float(torch.cat(recalled).double().mean()))
