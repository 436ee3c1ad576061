"""Integrals of interpolation polynomials, for multistep methods."""

from collections.abc import Sequence

import torch
from torch import Tensor

from functional_sd3.flow.path import broadcast


def integral(values: Sequence[Tensor], nodes: Sequence[Tensor], moments: Sequence[Tensor], x: Tensor) -> Tensor:
    """Integral of the polynomial through the values (batch, ...) at the nodes, a scalar or (batch,) each, in Newton's
    form.

    The first node is 0. moments: the integral of 1, of u, u^2 ... under the weight that is integrated with.
    """
    differences = list(values)
    total = broadcast(moments[0], x) * differences[0]
    # u (u - u_1) ... as coefficients of the powers of u, lowest first.
    product = [torch.ones_like(moments[0])]
    for level in range(1, len(values)):
        differences = [
            (differences[i] - differences[i + 1]) / broadcast(_difference(nodes[i], nodes[i + level]), x)
            for i in range(len(differences) - 1)
        ]
        root = nodes[level - 1]
        raised, lowered = [0 * root, *product], [*(root * c for c in product), 0 * root]
        product = [high - low for high, low in zip(raised, lowered, strict=True)]
        weight = sum(c * moment for c, moment in zip(product, moments, strict=False))
        total = total + broadcast(weight, x) * differences[0]
    return total


def _difference(node: Tensor, other: Tensor) -> Tensor:
    # Equal times come from the padding at the end of a shorter grid in a batch, where every weight is 0.
    return torch.where(node == other, 1.0, node - other)
