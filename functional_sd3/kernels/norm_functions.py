"""Norms under forward-mode differentiation: tangents in few passes over memory.

Without scale and shift the Jacobian of a layer norm, y = (x - mean) / std, is symmetric, and so is that of an RMS norm:
(1 - 1 1^T / n - y y^T / n) / std and (1 - y y^T / n) / rms for x of n numbers. The tangent along x' is therefore what
the backward pass gives for the cotangent x'. PyTorch 2.13 computes it operation by operation, and adds the tangent of
every constant, zeros, by a Python reference that takes 0.15 ms whatever the size. Of its own tangent of a layer norm
the derivatives are wrong (`norms.fits_layer_norm`).
"""

from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core.types import Params
from functional_sd3.kernels.modulation_functions import AddProduct
from functional_sd3.kernels.single_level import FlatFunction, fits_forward_mode


def fits(params: Params, x: Tensor, eps: float) -> bool:
    """True under forward mode."""
    return fits_forward_mode(x)


def layer_norm(params: Params, x: Tensor, eps: float) -> Tensor:
    """`layers.layer_norm` by `LayerNorm`."""
    normed = LayerNorm.apply(eps, x)[0]
    if not params:
        return normed
    weight, bias = (leaf.expand(*[1] * (x.ndim - 1), -1) for leaf in (params["weight"], params["bias"]))
    return AddProduct.apply(bias, normed, weight)[0]


def rms_norm(params: Params, x: Tensor, eps: float) -> Tensor:
    """`layers.rms_norm` by `RmsNorm`."""
    return RmsNorm.apply(eps, x, params["weight"])[0]


def fits_group_norm(params: Params, x: Tensor, groups: int, eps: float) -> bool:
    """True under forward mode, of one dtype."""
    return fits_forward_mode(x) and params["weight"].dtype == x.dtype


def group_norm(params: Params, x: Tensor, groups: int, eps: float) -> Tensor:
    """`layers.group_norm` by `LayerNorm` of each group's numbers."""
    normed = LayerNorm.apply(eps, x.reshape(len(x), groups, -1))[0].reshape(x.shape)
    weight, bias = (params[name].reshape(1, -1, *[1] * (x.ndim - 2)) for name in ("weight", "bias"))
    return AddProduct.apply(bias, normed, weight)[0]


class LayerNorm(FlatFunction):
    """(eps, x) -> (y, mean, 1 / std), the last two of which are not differentiated."""

    @staticmethod
    def forward(eps: float, x: Tensor) -> tuple[Tensor, ...]:
        return torch.native_layer_norm(x, x.shape[-1:], None, None, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[float, Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        LayerNorm.save_for_both(ctx, inputs[1], *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> Any:
        return None, None if g is None else _layer_norm_jacobian(g, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor | None) -> Any:
        return None if tangent is None else _layer_norm_jacobian(tangent, *ctx.saved_tensors), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, eps: float, x: Tensor) -> Any:
        return LayerNorm.apply(eps, x.movedim(in_dims[1], 0)), (0, 0, 0)


def _layer_norm_jacobian(along: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor) -> Tensor:
    """The symmetric Jacobian at x times a vector. mean and inverse_std are for their values; that they depend on x is
    part of the derivatives of PyTorch's function."""
    options = (x.shape[-1:], mean, inverse_std, None, None, [True, False, False])
    return torch.ops.aten.native_layer_norm_backward(along, x, *options)[0]


class RmsNorm(FlatFunction):
    """(eps, x, weight) -> (x / sqrt(mean(x^2) + eps) * weight,)."""

    @staticmethod
    def forward(eps: float, x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (layers.rms_norm.formula({"weight": weight}, x, eps),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[float, Tensor, Tensor], output: tuple[Tensor]) -> None:
        ctx.eps = inputs[0]
        RmsNorm.save_for_both(ctx, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        (x, weight), (_, of_x, of_weight) = ctx.saved_tensors, ctx.needs_input_grad
        if g is None:
            return None, None, None
        x_gradient = weight_gradient = None
        if of_x:
            x_gradient = _rms_norm_jacobian(g * weight, x, ctx.eps)
        if of_weight:
            weight_gradient = (g * _normed(x, ctx.eps)).sum_to_size(weight.shape)
        return None, x_gradient, weight_gradient

    @staticmethod
    def jvp(ctx: Any, _: None, x_tangent: Tensor | None, weight_tangent: Tensor | None) -> Any:
        x, weight = ctx.saved_tensors
        parts = [] if x_tangent is None else [_rms_norm_jacobian(x_tangent, x, ctx.eps) * weight]
        parts += [] if weight_tangent is None else [_normed(x, ctx.eps) * weight_tangent]
        return (parts[0] + parts[1] if len(parts) == 2 else parts[0] if parts else None,)

    @staticmethod
    def vmap(info: Any, in_dims: Any, eps: float, x: Tensor, weight: Tensor) -> Any:
        if in_dims[2] is None:
            return RmsNorm.apply(eps, x.movedim(in_dims[1], 0), weight), (0,)
        x = x.expand(info.batch_size, *x.shape) if in_dims[1] is None else x.movedim(in_dims[1], 0)
        weight = weight.movedim(in_dims[2], 0)
        weight = weight.view(len(weight), *[1] * (x.ndim - 2), x.shape[-1])
        return (layers.rms_norm.formula({"weight": weight}, x, eps),), (0,)


def _rms_norm_jacobian(along: Tensor, x: Tensor, eps: float) -> Tensor:
    """The symmetric Jacobian of the norm without weight at x times a vector."""
    wide, along_wide = (each.to(torch.promote_types(x.dtype, torch.float32)) for each in (x, along))
    inverse = _inverse_rms(wide, eps)
    share = (wide * along_wide).mean(-1, keepdim=True) * inverse.square()
    return (torch.addcmul(along_wide, wide, share, value=-1) * inverse).to(x.dtype)


def _normed(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * _inverse_rms(wide, eps)).to(x.dtype)


def _inverse_rms(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
