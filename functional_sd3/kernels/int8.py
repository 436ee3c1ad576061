"""Kernels of `core.layers.linear` for layers with "int8_scale", on CPUs that have instructions for products of int8."""

from collections.abc import Callable

import torch
from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core.types import Params
from functional_sd3.kernels import int8_functions, narrow, products
from functional_sd3.kernels.single_level import is_available

LEAST_SIZE = narrow.here().int8 if int8_functions.product() is not None else None
"""Least size of a weight whose products are faster in int8 on this machine; None without instructions for them."""
_NAMES = {"weight", "int8_scale", "bias", "low_rank"}


def fits(params: Params, x: Tensor) -> bool:
    """True for a layer of a product in int8 on a CPU where that is faster, whatever the rows."""
    return fits_in_graph(params, x) and products.is_enabled()


def fits_in_graph(params: Params, x: Tensor) -> bool:
    """`fits` without questions that the compiler does not read."""
    if LEAST_SIZE is None or "int8_scale" not in params or not params.keys() <= _NAMES or x.ndim < 2:
        return False
    weight, scale = params["weight"], params["int8_scale"]
    is_large = weight.dtype is torch.int8 and weight.numel() >= LEAST_SIZE and not scale.requires_grad
    return is_large and x.dtype in (torch.float32, torch.bfloat16) and all(leaf.is_cpu for leaf in (x, weight, scale))


def fits_differentiable(params: Params, x: Tensor) -> bool:
    """True where `fits` is, functions have every derivative and nothing else chooses dtypes."""
    return fits(params, x) and is_available() and not torch.is_autocast_enabled(x.device.type)


def fits_activation(params: Params, x: Tensor, activation: str) -> bool:
    """True where `fits` is, for a layer without LoRA."""
    return "low_rank" not in params and fits(params, x)


def linear(params: Params, x: Tensor) -> Tensor:
    """`layers.linear` of a layer with "int8_scale"."""
    return _linear(int8_functions.linear_rows, params, x)


def differentiable(params: Params, x: Tensor) -> Tensor:
    """`linear` with every derivative."""
    return _linear(int8_functions.linear_int8, params, x)


def in_graph(params: Params, x: Tensor) -> Tensor:
    """`differentiable` as one call in a compiled graph."""
    # Imported while a compiler traces: the mark that it sets imports the compiler.
    from functional_sd3.kernels import graph_calls

    return _linear(graph_calls.linear_int8, params, x)


def _linear(of_rows: Callable[..., Tensor], params: Params, x: Tensor) -> Tensor:
    y = of_rows(x.flatten(0, -2), params["weight"], params["int8_scale"], params.get("bias"))
    return layers.add_low_rank(params, x, y.unflatten(0, x.shape[:-1]))


def linear_activation(params: Params, x: Tensor, activation: str) -> Tensor:
    """`layers.linear_activation`, computed while a block of rows is in the cache."""
    rows, weight, scale = x.flatten(0, -2), params["weight"], params["int8_scale"]
    return int8_functions.linear_rows(rows, weight, scale, params.get("bias"), activation).unflatten(0, x.shape[:-1])
