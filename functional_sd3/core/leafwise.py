"""Arithmetic on lists of tensors, leaf by leaf, for optimisers and averages of whole trees.

Functions whose names end in `_inplace` write into their first argument and are for donated trees alone.
"""

import torch
from torch import Tensor

from functional_sd3.core.dispatch import op

Leaves = list[Tensor] | tuple[Tensor, ...]


@op
def multiply(leaves: Leaves, factor: Tensor | float) -> list[Tensor]:
    """leaf * factor; factor a number or a tensor ()."""
    return [leaf * factor for leaf in leaves]


@op
def add(leaves: Leaves, others: Leaves, factor: float = 1.0) -> list[Tensor]:
    """leaf + factor * other."""
    return [leaf + factor * other for leaf, other in zip(leaves, others, strict=True)]


@op
def add_inplace(leaves: Leaves, others: Leaves) -> None:
    """leaf += other."""
    for leaf, other in zip(leaves, others, strict=True):
        leaf.add_(other)


@op
def lerp(starts: Leaves, ends: Leaves, weight: Tensor) -> list[Tensor]:
    """start + weight * (end - start); weight ()."""
    return [torch.lerp(start, end, weight.to(start.dtype)) for start, end in zip(starts, ends, strict=True)]


@op
def lerp_inplace(starts: Leaves, ends: Leaves, weight: Tensor) -> None:
    """start += weight * (end - start); weight ()."""
    for start, end in zip(starts, ends, strict=True):
        start.lerp_(end, weight.to(start.dtype))


@op
def global_norm(leaves: Leaves) -> Tensor:
    """sqrt of the sum of squares of all numbers, float32 ()."""
    norms = [torch.linalg.vector_norm(leaf, dtype=torch.float32) for leaf in leaves]
    return torch.stack(norms).norm() if norms else torch.zeros((), dtype=torch.float32, device="cpu")


@op
def adam(
    gradients: Leaves, mean: Leaves, square: Leaves, bias1: Tensor, bias2: Tensor, b1: float, b2: float, eps: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Directions and both moving averages of Adam (Kingma and Ba 2015, algorithm 1).

    mean = b1 mean + (1 - b1) g; square = b2 square + (1 - b2) g^2; direction = (mean / bias1) / (sqrt(square / bias2) +
    eps), bias_i = 1 - b_i^n for the n-th step, tensors ().
    """
    mean = [b1 * old + (1 - b1) * gradient for old, gradient in zip(mean, gradients, strict=True)]
    square = [b2 * old + (1 - b2) * gradient.square() for old, gradient in zip(square, gradients, strict=True)]
    pairs = zip(mean, square, strict=True)
    return [m / (v.sqrt() / bias2.sqrt() + eps) / bias1 for m, v in pairs], mean, square


@op
def adamw_inplace(
    weights: Leaves, gradients: Leaves, mean: Leaves, square: Leaves, count: Tensor, divisor: Tensor | None,
    rate: Tensor, b1: float, b2: float, eps: float, decay: float,
) -> None:  # fmt: skip
    """One step of AdamW written into weights, mean and square, float32 (Loshchilov and Hutter 2019, algorithm 2).

    count (): the number of this step, float32. divisor: the gradients are first divided by it; they may be
    overwritten by the quotients. weight <- weight - rate (direction + decay weight).
    """
    if divisor is not None:
        gradients = multiply(gradients, 1 / divisor)
    bias1, bias2 = 1 - b1**count, 1 - b2**count
    directions, new_mean, new_square = adam(gradients, mean, square, bias1, bias2, b1, b2, eps)
    for weight, direction in zip(weights, directions, strict=True):
        weight.mul_(1 - rate * decay).sub_(rate * direction)
    for old, new in (*zip(mean, new_mean, strict=True), *zip(square, new_square, strict=True)):
        old.copy_(new)
