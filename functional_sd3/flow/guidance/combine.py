"""Formulas of guidance: one velocity from several at one point, in float32 or wider.

Velocities are (batch, ...). Inner products, norms and deviations are per sample, over all its elements, so that no
sample changes another's. Scales and factors are numbers, or tensors () or (batch,).
"""

import torch
from torch import Tensor

from functional_sd3.flow.path import broadcast
from functional_sd3.flow.per_sample import dot

Factor = float | Tensor


def extrapolate(start: Tensor, end: Tensor, scale: Factor) -> Tensor:
    """Linear extrapolation, start + scale (end - start)."""
    start, end = promoted(start, end)
    return start + broadcast(scale, start) * (end - start)


def add_difference(guided: Tensor, start: Tensor, end: Tensor, scale: Factor) -> Tensor:
    """The guided velocity plus a scaled difference, guided + scale (end - start)."""
    guided, start, end = promoted(guided, start, end)
    return guided + broadcast(scale, start) * (end - start)


def project_onto(negative: Tensor, positive: Tensor) -> Tensor:
    """Projection of the positive velocity onto the negative one: s* v_n with s* = <v_p, v_n> / |v_n|^2.

    CFG-Zero* (Fan et al. 2025, arXiv:2503.18886), with diffusers' 1e-8 added to |v_n|^2.
    """
    negative, positive = promoted(negative, positive)
    return broadcast(dot(positive, negative) / (dot(negative, negative) + 1e-8), negative) * negative


def tangential_component(negative: Tensor, positive: Tensor) -> Tensor:
    """Component of the negative velocity along the first right singular vector of the two velocities.

    Tangential guidance (Kwon et al. 2025, arXiv:2503.18137). With the Gram matrix G of (v_p, v_n) and P the projector
    onto its first eigenvector, it is P_12 v_p + P_22 v_n: no decomposition of a matrix as wide as an image, and
    derivatives wherever the two singular values differ.
    """
    negative, positive = promoted(negative, positive)
    half = (dot(positive, positive) - dot(negative, negative)) / 2
    cross = dot(positive, negative)
    # Half the distance of the eigenvalues; 0 where the vectors are orthogonal and of one length, and none is first.
    radius = (half.square() + cross.square()).clamp(min=torch.finfo(half.dtype).tiny).sqrt()
    along, own = cross / (2 * radius), (1 - half / radius) / 2
    return broadcast(along, positive) * positive + broadcast(own, negative) * negative


def clip_norm(difference: Tensor, longest: Factor) -> Tensor:
    """The difference (batch, ...) with its norm clipped to `longest` > 0, a number, () or (batch,)."""
    squares = dot(difference, difference)
    # A number is filled in on the device: a copy from the host is forbidden while a CUDA graph is captured.
    longest = longest.to(squares) if isinstance(longest, Tensor) else squares.new_full((), longest)
    return broadcast(longest / torch.maximum(squares, longest.square()).sqrt(), difference) * difference


def scale_parallel(difference: Tensor, direction: Tensor, weight: Factor) -> Tensor:
    """The difference (batch, ...) with its component along `direction`, like it, scaled by `weight`; 1 changes
    nothing."""
    difference, direction = promoted(difference, direction)
    squares = dot(direction, direction).clamp(min=torch.finfo(direction.dtype).tiny)
    parallel = broadcast(dot(difference, direction) / squares, direction) * direction
    return difference - parallel + broadcast(weight, parallel) * parallel


def damped_scale(negative: Tensor, positive: Tensor, scale: Factor, rate: Factor) -> Tensor:
    """Magnitude-aware scale 1 + (scale - 1) exp(-rate |v_p - v_n| / |v_n|), (batch,): smaller for a larger change.

    Magnitude-aware guidance (MAMBO-G, arXiv:2508.03442).
    """
    negative, positive = promoted(negative, positive)
    difference = positive - negative
    # The root has no derivative at 0: there it is that of a constant.
    squares = (dot(difference, difference) / dot(negative, negative).clamp(min=1e-20)).clamp(min=1e-20)
    return 1 + (scale - 1) * torch.exp(-rate * squares.sqrt())


def rescale(guided: Tensor, positive: Tensor, factor: Factor) -> Tensor:
    """Guided velocity with the standard deviation of the positive one, mixed in by `factor` in [0, 1].

    factor v_g std(v_p) / std(v_g) + (1 - factor) v_g (Lin et al. 2023, arXiv:2305.08891, section 3.4).
    """
    guided, positive = promoted(guided, positive)
    ratio = standard_deviation(positive) / standard_deviation(guided)
    return extrapolate(guided, broadcast(ratio, guided) * guided, factor)


def standard_deviation(x: Tensor) -> Tensor:
    """Unbiased standard deviation of each sample's elements, (batch,), clamped above 0."""
    return x.reshape(x.shape[0], -1).var(1).clamp(min=torch.finfo(x.dtype).tiny).sqrt()


def promoted(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32, or in the widest of their dtypes if that is wider."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]
