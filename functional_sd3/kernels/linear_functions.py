"""Linear layers as functions with every derivative: by the faster library, and in forward mode without products with
zeros.

The tangent of a product is a' b + a b'. Where one factor does not vary PyTorch 2.13 multiplies by a matrix of zeros all
the same, and adds the zeros of a bias by a Python reference: the tangent of a layer along its input costs two products
instead of one, and 0.2 ms beside them. Here only what varies is multiplied, also in derivatives of gradients.
"""

from typing import Any

from torch import Tensor

from functional_sd3.kernels import products
from functional_sd3.kernels.single_level import FlatFunction, first_mapped


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (rows, inputs) weight^T + bias."""
    return Linear.apply(x, weight, bias)[0]


class Linear(FlatFunction):
    """(x (rows, inputs), weight (outputs, inputs), bias (outputs,) or None) -> (x weight^T + bias,)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
        return (products.linear(x, weight, bias),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        Linear.save_for_both(ctx, *inputs[:2])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        if g is None:
            return None, None, None
        return (
            Product.apply(g, weight)[0] if of_x else None,
            Product.apply(g.t(), x)[0] if of_weight else None,
            g.sum(0) if of_bias else None,
        )

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, weight_tangent: Tensor | None, bias_tangent: Tensor | None) -> Any:
        x, weight = ctx.saved_tensors
        if weight_tangent is not None:
            tangent = products.linear(x, weight_tangent, bias_tangent)
            return (tangent if x_tangent is None else tangent + products.linear(x_tangent, weight),)
        if x_tangent is not None:
            return (products.linear(x_tangent, weight, bias_tangent),)
        return (None if bias_tangent is None else bias_tangent.repeat(len(x), 1),)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        if in_dims[1:] == (None, None):
            x = x.movedim(in_dims[0], 0)
            return (Linear.apply(x.flatten(0, 1), weight, bias)[0].unflatten(0, x.shape[:2]),), (0,)
        y = first_mapped(x, in_dims[0]) @ first_mapped(weight, in_dims[1]).mT
        return (y if bias is None else y + first_mapped(bias, in_dims[2]).unsqueeze(-2),), (0,)


class Product(FlatFunction):
    """(a (rows, inner), b (inner, columns)) -> (a b,)."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> tuple[Tensor]:
        return (products.mm(a, b),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor]) -> None:
        Product.save_for_both(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        (a, b), (of_a, of_b) = ctx.saved_tensors, ctx.needs_input_grad
        if g is None:
            return None, None
        return Product.apply(g, b.t())[0] if of_a else None, Product.apply(a.t(), g)[0] if of_b else None

    @staticmethod
    def jvp(ctx: Any, a_tangent: Tensor | None, b_tangent: Tensor | None) -> Any:
        a, b = ctx.saved_tensors
        parts = [] if a_tangent is None else [products.mm(a_tangent, b)]
        parts += [] if b_tangent is None else [products.mm(a, b_tangent)]
        return (parts[0] + parts[1] if len(parts) == 2 else parts[0] if parts else None,)

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, b: Tensor) -> Any:
        if in_dims[1] is None:
            a = a.movedim(in_dims[0], 0)
            return (Product.apply(a.flatten(0, 1), b)[0].unflatten(0, a.shape[:2]),), (0,)
        return (first_mapped(a, in_dims[0]) @ first_mapped(b, in_dims[1]),), (0,)
