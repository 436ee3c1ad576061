"""Functions whose backward pass is written by hand, in fewer passes over memory than autograd makes of their formulas.

For eager autograd alone (`watching.by_autograd`): transforms of torch.func, forward-mode derivatives and compilers are
given the formulas, and so is a backward pass that is differentiated itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from functional_sd3.core import cpu
from functional_sd3.core.watching import is_ordinary

Found = tuple[Tensor | None, ...]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weight^T + bias: x (rows, inputs), weight (outputs, inputs), bias (outputs,) -> (rows, outputs)."""
    return _Linear.apply(x, weight, bias)


def mlp(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    """Two linear layers with GELU's tanh form between them: x (rows, inputs) -> (rows, outputs)."""
    return _Mlp.apply(x, weight, bias, out_weight, out_bias)


def add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a b, broadcast."""
    return _AddProduct.apply(x, a, b)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight: the mean over the last axis, weight (x.shape[-1],)."""
    return _RmsNorm.apply(x, weight, eps)


def rms_norm_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same for whatever looks into it; narrower dtypes than float32 are normed in float32."""
    # Not PyTorch's: inductor fuses the formula, and unlike the fused kernel it has every derivative and batching rule.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Found:
        x, weight, bias = ctx.saved_tensors
        if _is_watched(gradient):
            return _again(F.linear, ctx, (x, weight, bias), gradient)
        to_x, *to_layer = ctx.needs_input_grad
        return (gradient.mm(weight) if to_x else None, *_to_layer(x, gradient, *to_layer))


class _Mlp(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
        before = F.linear(x, weight, bias)
        hidden = cpu.gelu_tanh(before) if cpu.has_gelu_tanh(before) else F.gelu(before, approximate="tanh")
        ctx.save_for_backward(x, weight, bias, out_weight, out_bias, before, hidden)
        return F.linear(hidden, out_weight, out_bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Found:
        *inputs, before, hidden = ctx.saved_tensors
        if _is_watched(gradient):
            return _again(_mlp_formula, ctx, inputs, gradient)
        x, weight, _, out_weight, _ = inputs
        to_x, to_weight, to_bias, *to_out = ctx.needs_input_grad
        out = _to_layer(hidden, gradient, *to_out)
        if not (to_x or to_weight or to_bias):
            return None, None, None, *out
        # In place: at this size a second tensor costs more in page faults than what is computed into it.
        inner = gradient.mm(out_weight)
        torch.ops.aten.gelu_backward.grad_input(inner, before, approximate="tanh", grad_input=inner)
        return (inner.mm(weight) if to_x else None, *_to_layer(x, inner, to_weight, to_bias), *out)


def _mlp_formula(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight, bias), approximate="tanh"), out_weight, out_bias)


def _to_layer(x: Tensor, gradient: Tensor, to_weight: bool, to_bias: bool) -> Found:
    """Of a linear layer's weight and bias, from x and the gradient of its output."""
    return (
        gradient.t().mm(x) if to_weight else None,
        # A product is three times as fast as a sum over rows.
        gradient.t().mv(gradient.new_ones(len(gradient))) if to_bias else None,
    )


class _AddProduct(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.shape = x.shape
        return torch.addcmul(x, a, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Found:
        # PyTorch's also multiplies by addcmul's `value`, in two passes more.
        a, b = ctx.saved_tensors
        to_x, to_a, to_b = ctx.needs_input_grad
        return (
            gradient.sum_to_size(ctx.shape) if to_x else None,
            (gradient * b).sum_to_size(a.shape) if to_a else None,
            (gradient * a).sum_to_size(b.shape) if to_b else None,
        )


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Found:
        x, weight, inverse = ctx.saved_tensors
        if _is_watched(gradient):
            formula = lambda *inputs: rms_norm_formula(*inputs, ctx.eps)  # noqa: E731
            return (*_again(formula, ctx, (x, weight), gradient), None)
        normed = x * inverse
        product = gradient * normed
        to_weight = product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, to_weight, None
        # inverse (weight gradient - normed mean(weight gradient normed))
        mean = (product @ weight[:, None]).div_(-x.shape[-1])
        to_x = torch.mul(gradient, weight, out=product).addcmul_(normed, mean).mul_(inverse)
        return to_x, to_weight, None


def _is_watched(gradient: Tensor) -> bool:
    """Whether a backward pass is differentiated or mapped itself."""
    return torch.is_grad_enabled() or not is_ordinary(gradient)


def _again(formula: Callable[..., Tensor], ctx: Any, inputs: Sequence[Tensor], gradient: Tensor) -> Found:
    """The backward pass that autograd makes of the formula, which can be differentiated and mapped."""
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: the gradient of each input itself, not through what the others were computed from.
        own = [x.view_as(x) if differentiated else x.detach().requires_grad_() for x in inputs]
        needed = [x for x, needs in zip(own, ctx.needs_input_grad, strict=False) if needs]
        found = iter(torch.autograd.grad(formula(*own), needed, gradient, create_graph=differentiated))
    return tuple(next(found) if needs else None for _, needs in zip(own, ctx.needs_input_grad, strict=False))
