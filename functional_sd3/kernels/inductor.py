"""Formulas that inductor compiles to faster code; they run under the compiler only."""

import math

import torch
from torch import Tensor

from functional_sd3.core import layers, prng
from functional_sd3.core.types import Params


def fits_linear(params: Params, x: Tensor) -> bool:
    """A bias, and more than two dimensions."""
    return "bias" in params and x.ndim > 2


def linear(params: Params, x: Tensor) -> Tensor:
    """`layers.linear` of x as a matrix: with a bias, three dimensions specialise shapes under compile(grad) and are
    compiled anew for every resolution."""
    return layers.linear.formula(params, x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def fits_gelu_tanh(x: Tensor) -> bool:
    """True on a CPU, whose tanh is slow."""
    return x.device.type == "cpu"


def gelu_tanh(x: Tensor) -> Tensor:
    """`layers.gelu_tanh` by a sigmoid: (1 + tanh y) / 2 is sigmoid 2y, with which inductor takes 9.3 ms of 4 million
    numbers, with tanh 11.9."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cubic = wide * (1 + 0.044715 * wide.square())
    return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * cubic)).to(x.dtype)


def fits_threefry(key0: Tensor, key1: Tensor, low: Tensor, high: Tensor | None = None) -> bool:
    """True for all arguments."""
    return True


def threefry(key0: Tensor, key1: Tensor, low: Tensor, high: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`prng.threefry` with both words named in each round.

    A round uses both more than once, and inductor would write out the expression again for each use: over 2**20 times
    in all.
    """
    schedule = (key0, key1, key0 ^ key1 ^ prng.PARITY)
    second = key1 + low
    first = key0 + (torch.zeros_like(second) if high is None else high)
    for group in range(5):
        for rotation in prng.ROTATIONS[group % 2]:
            first, second = _name(first), _name(second)
            first = first + second
            below = (second >> (32 - rotation)) & ((1 << rotation) - 1)
            second = ((second << rotation) | below) ^ first
        first = first + schedule[(group + 1) % 3]
        second = second + schedule[(group + 2) % 3] + (group + 1)
    return first, second


def _name(x: Tensor) -> Tensor:
    # A strided view makes inductor store the value in a variable; the kernel stays one.
    return x.as_strided(x.shape, x.stride()).clone()
