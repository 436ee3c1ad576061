"""Density and coverage: precision and recall that are robust to single outliers.

Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models", equations 3 and 4.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.metrics import neighbours


class DensityCoverage(NamedTuple):
    """Density is about 1 for sets of one distribution and may be larger; coverage is in [0, 1]."""

    density: float
    coverage: float


def score(real: Tensor, generated: Tensor, *, neighbour: int = 5) -> DensityCoverage:
    """Density and coverage of features real (n, d) and generated (m, d).

    Around every real sample is a ball that reaches to its `neighbour`-th nearest real one, border excluded. density:
    mean number of balls that a generated sample is in, over `neighbour`; coverage: the share of balls that contain a
    generated sample. Raises ValueError for dimensions that differ, NaN, or too few samples.
    """
    neighbours.check(real, generated, neighbour)
    radii = neighbours.radii(real, neighbour)
    counts, start = [], 0
    for block in neighbours.blocks(real, generated):
        counts.append((block < radii[start : start + len(block), None]).sum(1))
        start += len(block)
    in_ball = torch.cat(counts).double()
    return DensityCoverage(float(in_ball.sum()) / (neighbour * len(generated)), float((in_ball > 0).double().mean()))
