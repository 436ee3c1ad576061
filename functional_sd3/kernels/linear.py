"""Kernels of `core.layers.linear` under forward mode, by the functions of `linear_functions`."""

from collections.abc import Callable

from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core.types import Params
from functional_sd3.kernels import linear_functions
from functional_sd3.kernels.single_level import fits_forward_mode


def fits(params: Params, x: Tensor) -> bool:
    """True under forward mode, of a matrix or a batch."""
    return x.ndim > 1 and fits_forward_mode(x)


def differentiable(params: Params, x: Tensor) -> Tensor:
    """`layers.linear` by `linear_functions.Linear`."""
    return _linear(linear_functions.linear, params, x)


def in_graph(params: Params, x: Tensor) -> Tensor:
    """`differentiable` as one call in a compiled graph."""
    # Imported while a compiler traces: the mark that it sets imports the compiler.
    from functional_sd3.kernels import graph_calls

    return _linear(graph_calls.linear, params, x)


def _linear(of_rows: Callable[[Tensor, Tensor, Tensor | None], Tensor], params: Params, x: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    rounded = layers.rounded_input(params, rows)
    y = of_rows(rounded, layers.dequantized_weight(params, x.dtype), params.get("bias"))
    if "low_rank" in params:
        down, up = layers.low_rank_factors(params, x.dtype)
        y = y + of_rows(of_rows(rows, down, None), up, None)
    return y.unflatten(0, x.shape[:-1])
