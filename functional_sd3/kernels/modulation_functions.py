"""Modulations and gates under forward-mode differentiation: each a product added to something, in the fewest passes.

PyTorch 2.13 gives what does not vary, and the 1 of 1 + scale, tangents of zeros, which a Python reference adds in
0.15 ms whatever the size.
"""

from typing import Any

import torch
from torch import Tensor

from functional_sd3.kernels.single_level import FlatFunction, fits_forward_mode


def fits(*tensors: Tensor) -> bool:
    """True under forward mode, of one number of dimensions and one dtype."""
    first, *others = tensors
    return fits_forward_mode(first) and all(x.ndim == first.ndim and x.dtype == first.dtype for x in others)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`layers.modulate` by `AddProduct`; `rsub` adds a number whose tangent PyTorch knows to be zero."""
    return AddProduct.apply(shift, x, torch.rsub(scale, 1, alpha=-1))[0]


def add_gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """`layers.add_gated` by `AddProduct`."""
    return AddProduct.apply(x, gate, branch)[0]


class AddProduct(FlatFunction):
    """(a, b, c), of one number of dimensions -> (a + b * c,)."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor]:
        return (torch.addcmul(a, b, c),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor]) -> None:
        ctx.shapes = [x.shape for x in (*inputs, *output)]
        AddProduct.save_for_both(ctx, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return None, None, None
        b, c = ctx.saved_tensors
        return tuple(
            (g if factor is None else g * factor).sum_to_size(shape) if needed else None
            for factor, shape, needed in zip((None, c, b), ctx.shapes[:3], ctx.needs_input_grad, strict=True)
        )

    @staticmethod
    def jvp(ctx: Any, a_tangent: Tensor | None, b_tangent: Tensor | None, c_tangent: Tensor | None) -> Any:
        b, c = ctx.saved_tensors
        tangent = a_tangent
        for left, right in ((b_tangent, c), (b, c_tangent)):
            if left is not None and right is not None:
                tangent = left * right if tangent is None else torch.addcmul(tangent, left, right)
        if tangent is a_tangent and tangent is not None:
            tangent = tangent.expand(ctx.shapes[3]).clone()
        return (tangent,)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
        parts = [x.unsqueeze(0) if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, in_dims, strict=True)]
        return AddProduct.apply(*parts), (0,)
