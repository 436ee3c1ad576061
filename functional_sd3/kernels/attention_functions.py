"""Attention whose derivatives of every kind and order are attention again: four functions that call one another.

With J the Jacobian of attention at x = (q, k, v, mask), its tangent along x' is J x', its gradient for a cotangent g is
J^T g, and <x', J^T g> = <g, J x'>. As the second derivative is symmetric, the gradient of <x', J^T g> in x is the
tangent of J^T g along x'. So two functions beside the fused kernels give every derivative up to the second order:

    function           forward           backward                            jvp
    Attention          fused kernel      AttentionGradients                  AttentionTangent
    AttentionGradients fused kernel      AttentionTangent, GradientsTangent  GradientsTangent
    AttentionTangent   attention_tiles   AttentionGradients, GradientsTangent  formula
    GradientsTangent   attention_tiles   formula                             formula

"formula" is `core.attention.softmax_attention`, by blocks of rematerialised rows. A mapped dimension is folded into the
batch. All of it takes memory linear in the tokens, except the gradient of a mask, which is as large as the scores.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core.attention import softmax_attention
from functional_sd3.core.recompute import gradients_of, tangent_of
from functional_sd3.kernels import attention_fused, attention_operators
from functional_sd3.kernels.single_level import FlatFunction


@dataclass(frozen=True)
class Settings:
    """Numbers of an attention; of_mask: gradients include the mask's."""

    causal: bool
    scale: float
    of_mask: bool = False


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """`softmax_attention` by fused kernels forwards and backwards, and by tiles for its other derivatives."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return attention(query.to(dtype), key.to(dtype), value.to(dtype), mask, causal, scale)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
        mask = mask.to(query.dtype).reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    return Attention.apply(Settings(causal, scale), query, key, value, mask)[0]


class _Rule(FlatFunction):
    """Base of the four functions: the arguments are the settings, then tensors or None, batch first.

    A mapped dimension is folded into the batch. The state of its generator that a GPU's kernel saves has no batch; it
    comes last.
    """

    batched_arguments: int
    batched_outputs: int
    masks: tuple[int, ...]
    """Positions of the mask and of its tangent, whose batch may be 1."""

    @staticmethod
    def save(ctx: Any, settings: Settings, tensors: Iterable[Tensor | None]) -> None:
        saved = tuple(tensors)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, settings: Settings, *tensors: Any) -> Any:
        dims, size = in_dims[1:], info.batch_size

        def batch_of(position: int) -> int:
            x, dim = tensors[position], dims[position]
            return len(x) if dim is None else x.movedim(dim, 0).shape[1]

        batch, mask = batch_of(0), cls.masks[0]
        shared_mask = tensors[mask] is not None and batch_of(mask) == 1

        def fold(position: int) -> Tensor | None:
            x, dim = tensors[position], dims[position]
            if x is None or position >= cls.batched_arguments:
                return x
            if dim is None and position in cls.masks and len(x) == 1 and not settings.of_mask:
                return x
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            if position in cls.masks:
                x = x.expand(size, batch, *x.shape[2:])
            return x.flatten(0, 1)

        def unfold(position: int, x: Tensor) -> Tensor:
            x = x.unflatten(0, (size, batch))
            # Gradients of q, k, v, mask.
            return x.sum(1, keepdim=True) if position == 3 and shared_mask else x

        outputs = cls.apply(settings, *map(fold, range(len(tensors))))
        batched, kept = outputs[: cls.batched_outputs], outputs[cls.batched_outputs :]
        unfolded = [unfold(position, x) for position, x in enumerate(batched)]
        return (*unfolded, *kept), (*(0 for _ in unfolded), *(None for _ in kept))


class Attention(_Rule):
    """(q, k, v, mask) -> (o, what a fused kernel saves, which is not differentiated)."""

    batched_arguments, batched_outputs, masks = 4, 2, (3,)

    @staticmethod
    def forward(settings: Settings, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(attention_fused.forward(q, k, v, mask, settings.causal, settings.scale))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        _Rule.save(ctx, inputs[0], (*inputs[1:], *output))

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> Any:
        if g is None:
            return (None,) * 5
        settings = replace(ctx.settings, of_mask=ctx.needs_input_grad[4])
        gradients = AttentionGradients.apply(settings, g, *ctx.saved_tensors)
        return None, *_four(gradients)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        q, k, v, mask, o, *saved = ctx.saved_tensors
        nothing = (None,) * len(saved)
        if all(tangent is None for tangent in tangents):
            return None, *nothing
        return AttentionTangent.apply(ctx.settings, q, k, v, mask, o, *tangents, *saved)[0], *nothing


class AttentionGradients(_Rule):
    """(g, q, k, v, mask, o, what was saved) -> gradients of q, k, v and, if `of_mask`, the mask for the cotangent g.

    o is an argument for its value only; that it varies with q, k, v and the mask is part of the derivatives here.
    """

    batched_arguments, batched_outputs, masks = 7, 4, (4,)

    @staticmethod
    def forward(settings: Settings, g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, o: Tensor, *saved):
        causal, scale = settings.causal, settings.scale
        gradients = attention_fused.backward(g, q, k, v, mask, o, saved, causal, scale)
        if settings.of_mask:
            return *gradients, attention_operators.mask_gradient(g, q, k, v, mask, o, causal, scale)
        return tuple(gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        _Rule.save(ctx, inputs[0], inputs[1:])

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> Any:
        g, q, k, v, mask, o, *saved = ctx.saved_tensors
        tangents, needed = _four(tangents), ctx.needs_input_grad[1:6]
        nothing = (None,) * (1 + len(saved))
        if all(tangent is None for tangent in tangents):
            return None, *(None,) * 5, *nothing
        of_g, of_inputs = None, (None,) * 4
        if needed[0]:
            (of_g,) = AttentionTangent.apply(ctx.settings, q, k, v, mask, o, *tangents, *saved)
        if any(needed[1:]):
            settings = replace(ctx.settings, of_mask=needed[4])
            of_inputs = _four(GradientsTangent.apply(settings, g, q, k, v, mask, o, None, *tangents))
        return None, of_g, *of_inputs, *nothing

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        return GradientsTangent.apply(ctx.settings, *ctx.saved_tensors[:6], *tangents[:5])


class AttentionTangent(_Rule):
    """(q, k, v, mask, o, tangents of q, k, v, mask or None, what was saved) -> (tangent of o,)."""

    batched_arguments, batched_outputs, masks = 10, 1, (3, 8)

    @staticmethod
    def forward(settings: Settings, q, k, v, mask, o, *rest) -> tuple[Tensor]:
        tangents = rest[:4]
        return (attention_operators.tangent(q, k, v, mask, o, *tangents, settings.causal, settings.scale),)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        _Rule.save(ctx, inputs[0], inputs[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        q, k, v, mask, o, *rest = ctx.saved_tensors
        tangents, saved, needed = rest[:4], rest[4:], ctx.needs_input_grad[1:]
        of_inputs = of_tangents = (None,) * 4
        if g is not None and any(needed[:4]):
            settings = replace(ctx.settings, of_mask=needed[3])
            of_inputs = _four(GradientsTangent.apply(settings, g, q, k, v, mask, o, None, *tangents))
        if g is not None and any(needed[5:9]):
            settings = replace(ctx.settings, of_mask=needed[8])
            of_tangents = _four(AttentionGradients.apply(settings, g, q, k, v, mask, o, *saved))
        return None, *of_inputs, None, *of_tangents, *(None,) * len(saved)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        q, k, v, mask, _o, *rest = ctx.saved_tensors
        inputs = (q, k, v, mask, *rest[:4])
        return (tangent_of(partial(_tangent_formula, ctx.settings), inputs, (*tangents[:4], *tangents[5:9])),)


class GradientsTangent(_Rule):
    """(g, q, k, v, mask, o, tangents of the first five or None) -> tangents of the gradients of q, k, v[, mask]."""

    batched_arguments, batched_outputs, masks = 11, 4, (4, 10)

    @staticmethod
    def forward(settings: Settings, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        causal, scale, of_mask = settings.causal, settings.scale, settings.of_mask
        return tuple(attention_operators.gradients_tangent(*tensors, causal, scale, of_mask))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        _Rule.save(ctx, inputs[0], inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        inputs, needed = _without_output(ctx.saved_tensors), _without_output(ctx.needs_input_grad[1:])
        formula = partial(_gradients_tangent_formula, ctx.settings)
        gradients = gradients_of(formula, inputs, needed, cotangents)
        return None, *gradients[:5], None, *gradients[5:]

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        formula = partial(_gradients_tangent_formula, ctx.settings)
        return tangent_of(formula, _without_output(ctx.saved_tensors), _without_output(tangents))


def _tangent_formula(settings: Settings, q, k, v, mask, *tangents: Tensor | None) -> Tensor:
    """The tangent of `AttentionTangent`, by the formula."""
    return tangent_of(partial(_formula, settings), (q, k, v, mask), tangents)


def _gradients_tangent_formula(settings: Settings, g, q, k, v, mask, *tangents: Tensor | None) -> tuple[Tensor, ...]:
    """The tangents of `GradientsTangent`, by the formula."""
    needed = (True, True, True, settings.of_mask)

    def gradients(g: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        results = gradients_of(lambda *x: (_formula(settings, *x),), inputs, needed, (g,))
        return tuple(result for result in results if result is not None)

    return tangent_of(gradients, (g, q, k, v, mask), tangents)


def _formula(settings: Settings, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return softmax_attention.formula(q, k, v, mask, settings.causal, settings.scale)


def _without_output(values: Sequence[Any]) -> tuple[Any, ...]:
    """The first eleven without o, the sixth."""
    return *values[:5], *values[6:11]


def _four(values: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """Values for q, k, v and the mask; None for a mask that is not differentiated."""
    q, k, v, *mask = values
    return q, k, v, mask[0] if mask else None
