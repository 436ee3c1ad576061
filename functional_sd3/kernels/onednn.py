"""Linear layers on CPUs by oneDNN and BLAS, for untracked float32 tensors.

oneDNN computes an activation while its input is in the cache, which PyTorch does not offer of eager code; on its GELU a
CPU otherwise spends a third of the time of the product.
"""

import functools

import torch
from torch import Tensor

from functional_sd3.core.dispatch import private
from functional_sd3.core.types import Params

ROWS = range(16, 513)
"""Rows of a matrix whose product oneDNN computes faster than PyTorch's BLAS: a fifth faster for 77 to 256 rows of 1,024
to 6,144 numbers, a twentieth for 512 (two cores with AVX-512, PyTorch 2.13)."""
SMALLEST_WEIGHT = 1 << 16
"""Least size of a weight for which oneDNN is faster: a call takes 20 microseconds, PyTorch's 4."""
_QUICK = 1.702
# Activation -> (oneDNN's name, its algorithm, s), with activation(x) = f(s x) / s.
_FUSED = {"quick_gelu": ("swish", "", _QUICK), "gelu": ("gelu", "none", 1.0), "gelu_tanh": ("gelu", "tanh", 1.0)}


def fits_linear(params: Params, x: Tensor) -> bool:
    """True for enough float32 rows on a CPU and a layer of weight and bias only."""
    return _is_large(params) and x.ndim > 1 and x.shape[:-1].numel() >= ROWS[0] and _is_plain_layer(params, x)


def linear(params: Params, x: Tensor) -> Tensor:
    """`layers.linear` by oneDNN, and of more rows by BLAS.

    PyTorch copies the bias to every row and has the product added to it, which takes 3 to 8 % longer at 384 inputs.
    """
    rows, weight, bias = x.flatten(0, -2), params["weight"], params.get("bias")
    if len(rows) in ROWS and _is_enabled():
        y = _linear_pointwise()(rows, weight, bias, "none", [], "")
    else:
        y = rows.mm(weight.t()) if bias is None else rows.mm(weight.t()).add_(bias)
    return y.unflatten(0, x.shape[:-1])


def fits_linear_activation(params: Params, x: Tensor, activation: str) -> bool:
    """True for float32 rows on a CPU and a layer of weight and bias only."""
    return _is_large(params) and x.ndim > 1 and _is_plain_layer(params, x) and _is_enabled()


def linear_activation(params: Params, x: Tensor, activation: str) -> Tensor:
    """`layers.linear_activation` by oneDNN."""
    name, algorithm, scale = _FUSED[activation]
    rows, bias = x.flatten(0, -2), params.get("bias")
    if scale != 1:
        rows, bias = rows * scale, None if bias is None else bias * scale
    y = _linear_pointwise()(rows, params["weight"], bias, name, [], algorithm)
    return (y if scale == 1 else y.mul_(1 / scale)).unflatten(0, x.shape[:-1])


def _is_large(params: Params) -> bool:
    return params["weight"].numel() >= SMALLEST_WEIGHT


def _is_plain_layer(params: Params, x: Tensor) -> bool:
    if not x.is_cpu or x.dtype is not torch.float32 or not params.keys() <= {"weight", "bias"}:
        return False
    return all(leaf.is_cpu and leaf.dtype is torch.float32 for leaf in params.values())


@functools.cache
def _linear_pointwise():
    ones = torch.ones(2, 2, dtype=torch.float32, device="cpu")
    return private("torch.ops.mkldnn._linear_pointwise", ones, ones, None, "none", [], "")


def _is_enabled() -> bool:
    backend = torch.backends.mkldnn
    return backend.is_available() and bool(backend.enabled) and _linear_pointwise() is not None
