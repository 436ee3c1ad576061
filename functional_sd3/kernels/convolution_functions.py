"""Convolutions under forward-mode differentiation, without products with zeros.

The tangent of a convolution is x' * w + x * w'. Where one factor does not vary PyTorch 2.13 convolves with zeros all
the same: the tangent of a decoder along its latents costs three times its products instead of two.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core.types import Params
from functional_sd3.kernels.single_level import FlatFunction, first_mapped, fits_forward_mode


def fits(params: Params, x: Tensor, *, stride: int = 1, padding: int = 0) -> bool:
    """True under forward mode."""
    return fits_forward_mode(x)


def conv2d(params: Params, x: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """`layers.conv2d` by `Convolution`."""
    weight = layers.dequantized_weight(params, x.dtype)
    y = Convolution.apply(stride, padding, x, weight, params["bias"])[0]
    if "low_rank" not in params:
        return y
    down, up = layers.low_rank_factors(params, x.dtype)
    inner = Convolution.apply(stride, padding, x, down, None)[0]
    return y + Convolution.apply(1, 0, inner, up[:, :, None, None], None)[0]


class Convolution(FlatFunction):
    """(stride, padding, x (batch, inputs, height, width), weight (outputs, inputs, rows, columns), bias (outputs,) or
    None) -> (their convolution,)."""

    @staticmethod
    def forward(stride: int, padding: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
        return (F.conv2d(x, weight, bias, stride=stride, padding=padding),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        ctx.stride, ctx.padding = inputs[:2]
        Convolution.save_for_both(ctx, *inputs[2:4])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        x, weight = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[2:])
        if g is None:
            return None, None, None, None, None
        sides: Sequence[Any] = ([ctx.stride] * 2, [ctx.padding] * 2, [1, 1], False, [0, 0], 1)
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(g, x, weight, None, *sides, [*wanted[:2], False])
        return None, None, of_x, of_weight, g.sum((0, 2, 3)) if wanted[2] else None

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> Any:
        (x, weight), (x_tangent, weight_tangent, bias_tangent) = ctx.saved_tensors, tangents
        sides = {"stride": ctx.stride, "padding": ctx.padding}
        if weight_tangent is not None:
            tangent = F.conv2d(x, weight_tangent, bias_tangent, **sides)
            return (tangent if x_tangent is None else tangent + F.conv2d(x_tangent, weight, **sides),)
        if x_tangent is not None:
            return (F.conv2d(x_tangent, weight, bias_tangent, **sides),)
        if bias_tangent is None:
            return (None,)
        height, width = (
            (side + 2 * ctx.padding - kernel) // ctx.stride + 1
            for side, kernel in zip(x.shape[2:], weight.shape[2:], strict=True)
        )
        return (bias_tangent[:, None, None].repeat(len(x), 1, height, width),)

    @staticmethod
    def vmap(info: Any, in_dims: Any, stride: int, padding: int, *tensors: Tensor) -> Any:
        x, weight, bias = tensors
        of_x, of_weight, of_bias = in_dims[2:]
        if of_weight is None and of_bias is None:
            x = x.movedim(of_x, 0)
            y = Convolution.apply(stride, padding, x.flatten(0, 1), weight, bias)[0]
            return (y.unflatten(0, x.shape[:2]),), (0,)
        # A group of channels for each mapped sample.
        count = info.batch_size
        x, weight = first_mapped(x, of_x), first_mapped(weight, of_weight)
        x = x.expand(count, *x.shape) if of_x is None else x
        weight = weight.expand(count, *weight.shape) if of_weight is None else weight
        grouped = F.conv2d(
            x.transpose(0, 1).flatten(1, 2), weight.flatten(0, 1), stride=stride, padding=padding, groups=count
        )
        y = grouped.unflatten(1, (count, -1)).transpose(0, 1)
        return (y if bias is None else y + first_mapped(bias, of_bias)[..., None, :, None, None],), (0,)
