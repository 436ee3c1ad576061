"""Linear layers on CPUs by oneDNN and BLAS, for float32 tensors, and by oneDNN for those of bfloat16.

oneDNN computes an activation while its input is in the cache, which PyTorch does not offer of eager code; on its GELU a
CPU otherwise spends a third of the time of the product.
"""

import torch
from torch import Tensor

from functional_sd3.core.clean_state import once_per_process
from functional_sd3.core.dispatch import private
from functional_sd3.core.types import Params
from functional_sd3.kernels import linear as functions
from functional_sd3.kernels import products

SMALLEST_WEIGHT = 1 << 16
"""Least size of a weight for which oneDNN is faster: a call takes 20 microseconds, PyTorch's 4."""
FEWEST_ROWS = 16
"""Rows from which the bias is added after the product by BLAS."""
_QUICK = 1.702
# Activation -> (oneDNN's name, its algorithm, s), with activation(x) = f(s x) / s.
_FUSED = {"quick_gelu": ("swish", "", _QUICK), "gelu": ("gelu", "none", 1.0), "gelu_tanh": ("gelu", "tanh", 1.0)}


def fits_linear(params: Params, x: Tensor) -> bool:
    """True for enough float32 rows on a CPU and a layer of weight and bias only."""
    if x.ndim < 2 or not _is_large(params) or not _is_plain_layer(params, x):
        return False
    rows = x.shape[:-1].numel()
    return rows >= FEWEST_ROWS or products.is_onednn(rows, params["weight"])


def linear(params: Params, x: Tensor) -> Tensor:
    """`layers.linear` by the library that `products` chooses.

    To a product by BLAS the bias is added afterwards: PyTorch copies it to every row and has the product added to it,
    which takes 3 to 8 % longer at 384 inputs.
    """
    rows, weight, bias = x.flatten(0, -2), params["weight"], params.get("bias")
    if products.is_onednn(len(rows), weight):
        y = products.pointwise()(rows, weight, bias, "none", [], "")
    else:
        y = rows.mm(weight.t()) if bias is None else rows.mm(weight.t()).add_(bias)
    return y.unflatten(0, x.shape[:-1])


def fits_differentiable(params: Params, x: Tensor) -> bool:
    """True where oneDNN is the faster library for large products, also for layers with "scale" or "low_rank"."""
    return _computes_float32(params, x) and products.is_onednn_tracked(x.shape[:-1].numel(), params["weight"])


def differentiable(params: Params, x: Tensor) -> Tensor:
    """`layers.linear` by a function with every derivative, whose products are those of `products`."""
    return functions.differentiable(params, x)


def fits_in_graph(params: Params, x: Tensor) -> bool:
    """True where `fits_differentiable` is for any number of rows, which a graph may leave open."""
    return _computes_float32(params, x) and products.is_onednn_for_all_rows(params["weight"])


def in_graph(params: Params, x: Tensor) -> Tensor:
    """`differentiable` as one call in a compiled graph."""
    return functions.in_graph(params, x)


def fits_linear_activation(params: Params, x: Tensor, activation: str) -> bool:
    """True for float32 rows on a CPU and a layer of weight and bias only."""
    return _is_large(params) and x.ndim > 1 and _is_plain_layer(params, x) and products.is_enabled()


def linear_activation(params: Params, x: Tensor, activation: str) -> Tensor:
    """`layers.linear_activation` by oneDNN."""
    name, algorithm, scale = _FUSED[activation]
    rows, bias = x.flatten(0, -2), params.get("bias")
    if scale != 1:
        rows, bias = rows * scale, None if bias is None else bias * scale
    y = products.pointwise()(rows, params["weight"], bias, name, [], algorithm)
    return (y if scale == 1 else y.mul_(1 / scale)).unflatten(0, x.shape[:-1])


def fits_bfloat16(params: Params, x: Tensor) -> bool:
    """True for bfloat16 rows on a CPU and a layer of weight, bias and nothing else."""
    return (
        x.ndim > 1
        and {"weight", "bias"} == params.keys()
        and _is_large(params)
        and all(each.is_cpu and each.dtype is torch.bfloat16 for each in (x, *params.values()))
        and has_bfloat16()
        and products.is_enabled()
    )


def linear_bfloat16(params: Params, x: Tensor) -> Tensor:
    """`layers.linear` with the bias added in the product, which PyTorch copies to every row beforehand; it rounds once.

    The product is oneDNN's in any case. 0.93 to 1 of the time for 512 to 2,048 rows of 256 to 2,048 numbers (Zen 4).
    """
    y = products.pointwise()(x.flatten(0, -2), params["weight"], params["bias"], "none", [], "")
    return y.unflatten(0, x.shape[:-1])


def fits_activation_bfloat16(params: Params, x: Tensor, activation: str) -> bool:
    """True where `fits_bfloat16` is, for activations that need no factor, which would be rounded."""
    return fits_bfloat16(params, x) and _FUSED[activation][2] == 1


def linear_activation_bfloat16(params: Params, x: Tensor, activation: str) -> Tensor:
    """`layers.linear_activation` with the activation of the product before it is rounded.

    0.69 of the time for 512 and 666 rows of 256 -> 1,024, 0.76 for 2,048 of 512 -> 2,048 (Zen 4).
    """
    name, algorithm, _ = _FUSED[activation]
    y = products.pointwise()(x.flatten(0, -2), params["weight"], params["bias"], name, [], algorithm)
    return y.unflatten(0, x.shape[:-1])


@once_per_process
def has_bfloat16() -> bool:
    """True where oneDNN multiplies bfloat16, if only by emulation: with AVX512 and more."""
    return bool(private("torch.ops.mkldnn._is_mkldnn_bf16_supported", missing=lambda: False)())


def _is_large(params: Params) -> bool:
    return params["weight"].numel() >= SMALLEST_WEIGHT


def _computes_float32(params: Params, x: Tensor) -> bool:
    return x.ndim > 1 and products.fits(x, params.get("scale", params["weight"]), params.get("bias"))


def _is_plain_layer(params: Params, x: Tensor) -> bool:
    return params.keys() <= {"weight", "bias"} and products.fits(x, *params.values())
