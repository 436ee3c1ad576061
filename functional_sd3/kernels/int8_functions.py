"""Linear layers by products of int8 as functions with every derivative.

PyTorch's `_int_mm` is oneDNN's product of signed int8 with sums in int32, of a weight as it is stored: on Zen 4 it
reaches 350 to 420 GFLOP/s on one thread, float32 80 to 105, bfloat16 150 to 200. oneDNN's quantised linear layer of
unsigned inputs is no faster and wants its weights packed, which takes as long as a product of a thousand rows; with
signed inputs it takes 3,000 times as long.
The sums are scaled block by block of rows, for less memory: 1,024 rows of 1,024 -> 3,072 take 20.5 ms in blocks of 512,
21.3 in blocks of 256 or at once, 25.7 in blocks of 128, as every product packs its weight anew; the product alone 15.4.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core.clean_state import once_per_process
from functional_sd3.core.dispatch import is_plain, private
from functional_sd3.kernels import products
from functional_sd3.kernels.linear_functions import Product
from functional_sd3.kernels.operators import define
from functional_sd3.kernels.single_level import FlatFunction, first_mapped

BLOCK = 512
"""Rows whose sums are scaled together."""


def linear_rows(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str = "") -> Tensor:
    """x (rows, inputs), weight (outputs, inputs) of int8, scale and bias (outputs,) -> (rows, outputs) as x is."""
    multiply, transposed, wide = product(), weight.t(), scale.float()
    added = torch.zeros_like(wide) if bias is None else bias.float()
    out = x.new_empty(len(x), len(weight))
    for rows, part in zip(x.split(BLOCK), out.split(BLOCK), strict=True):
        numbers, steps = round_to_int8(rows)
        # Not `sums * wide`: PyTorch multiplies int32 by float32 many times slower.
        y = multiply(numbers, transposed).float().mul_(wide)
        torch.addcmul(added, y, steps, out=y)
        part.copy_(layers.ACTIVATIONS[activation](y) if activation else y)
    return out


def round_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 of the shape of x, float32 (rows, 1)): numbers and steps whose products are `layers.round_rows` of x."""
    steps = layers.normal_step(x.abs().amax(-1, keepdim=True).float() / layers.INT8_MAX)
    return (x / steps).round_().to(torch.int8), steps


# An operator of its own, of which a compiled graph has one node.
_operator = define(
    "int8_linear",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
    linear_rows,
    lambda x, weight, scale, bias: x.new_empty(x.shape[0], weight.shape[0]),
)


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (rows, inputs), rounded to int8, times the weight (outputs, inputs) in int8; its derivatives are those of the
    product of x as it is with the dequantised weight."""
    return LinearInt8.apply(x, weight, scale, bias)[0]


class LinearInt8(FlatFunction):
    """(x (rows, inputs), weight (outputs, inputs) int8, scale (outputs,), bias (outputs,) or None) -> (rows, outputs);
    weight and scale are no variables."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor]:
        if is_plain(x, weight, scale, bias):
            return (_operator(x, weight, scale, bias),)
        return (F.linear(layers.round_rows(x), _dequantized((weight, scale), x), bias),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        ctx.rows = len(inputs[0])
        LinearInt8.save_for_both(ctx, *inputs[1:3])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return None, None, None, None
        of_x = Product.apply(g, _dequantized(ctx.saved_tensors, g))[0] if ctx.needs_input_grad[0] else None
        return of_x, None, None, g.sum(0) if ctx.needs_input_grad[3] else None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, _: Any, __: Any, bias_tangent: Tensor | None) -> Any:
        if x_tangent is None:
            return (None if bias_tangent is None else bias_tangent.repeat(ctx.rows, 1),)
        weight = _dequantized(ctx.saved_tensors, x_tangent)
        return (products.linear(x_tangent, weight, bias_tangent),)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
        if in_dims[1:] == (None, None, None):
            x = x.movedim(in_dims[0], 0)
            return (LinearInt8.apply(x.flatten(0, 1), weight, scale, bias)[0].unflatten(0, x.shape[:2]),), (0,)
        x, weight, scale = map(first_mapped, (x, weight, scale), in_dims)
        y = layers.round_rows(x) @ (weight.to(x.dtype) * scale.to(x.dtype).unsqueeze(-1)).mT
        return (y if bias is None else y + first_mapped(bias, in_dims[3]).unsqueeze(-2),), (0,)


def _dequantized(stored: Sequence[Tensor], like: Tensor) -> Tensor:
    weight, scale = stored
    return layers.dequantized_weight({"weight": weight, "scale": scale}, like.dtype)


@once_per_process
def product() -> Any:
    """int8 (rows, inner), int8 (inner, columns) -> int32 (rows, columns); None where PyTorch has none that is right.

    oneDNN held to AVX2 (DNNL_MAX_CPU_ISA) sums pairs in 16 bits, which large numbers do not fit.
    """
    large = torch.full((16, 64), 127, dtype=torch.int8, device="cpu")
    multiply = private("torch._int_mm", large, large.t())
    return multiply if multiply is not None and bool((multiply(large, large.t()) == 64 * 127**2).all()) else None
