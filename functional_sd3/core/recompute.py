"""Rematerialisation: functions that save only their inputs and are computed again when they are differentiated.

Gradient checkpointing (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174) for every
transform. `torch.utils.checkpoint` replaces saved tensors, which torch.func refuses. Here the derivatives of a
rematerialised function, in both modes, are rematerialised functions themselves, so that no order saves activations.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from functional_sd3.core import closures


def call(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """fn(*args, **kwargs), a tree of tensors, by `Recompute` of all tensors that fn and its arguments hold."""
    arguments = (fn, args, kwargs)
    inputs = closures.tensors(arguments)
    results: list[Any] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        function, positional, keywords = closures.replace_tensors(arguments, tensors)
        results[:] = [function(*positional, **keywords)]
        read = {id(tensor) for tensor in tensors}
        return tuple(x.view_as(x) if id(x) in read else x for x in closures.tensors(results[0]))

    outputs = Recompute.apply(flat, *inputs)
    return closures.replace_tensors(results.pop(), outputs)


class Recompute(Function):
    """Recompute.apply(fn, *tensors) is fn(*tensors), a tuple of tensors.

    fn is pure, closes over no tensor that is differentiated or mapped, and returns no input unchanged.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(fn: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        return fn(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fn, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        inputs, fn = ctx.saved_tensors, ctx.fn
        needed = ctx.needs_input_grad[1:]
        present = _present(cotangents)
        if not present or not any(needed):
            return (None,) * (1 + len(inputs))
        positions = [index for index, wanted in enumerate(needed) if wanted]

        def pullback(*arguments: Tensor) -> tuple[Tensor, ...]:
            given = _replace([None] * len(cotangents), present, arguments[len(inputs) :])
            gradients = gradients_of(fn, arguments[: len(inputs)], needed, given)
            return tuple(gradient for gradient in gradients if gradient is not None)

        gradients = Recompute.apply(pullback, *inputs, *(cotangents[index] for index in present))
        return None, *_replace([None] * len(inputs), positions, gradients)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        inputs, fn = ctx.saved_tensors, ctx.fn
        present = _present(tangents)

        def pushforward(*arguments: Tensor) -> tuple[Tensor, ...]:
            given = _replace([None] * len(tangents), present, arguments[len(inputs) :])
            return tangent_of(fn, arguments[: len(inputs)], given)

        return Recompute.apply(pushforward, *inputs, *(tangents[index] for index in present))


def tangent_of(fn: Callable[..., Any], inputs: Sequence[Tensor | None], tangents: Sequence[Tensor | None]) -> Any:
    """The tangent of fn(*inputs) along `tangents`, which are None for inputs that do not vary."""
    positions = _present(tangents)

    def of_varying(*varying: Tensor) -> Any:
        return fn(*_replace(inputs, positions, varying))

    primals = tuple(inputs[index] for index in positions)
    return torch.func.jvp(of_varying, primals, tuple(tangents[index] for index in positions))[1]


def gradients_of(
    fn: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of the inputs of fn, a function to a tuple of tensors, that are `needed`; None for the others.

    cotangents: of its outputs, None where they are zero; all gradients are None where all of them are.
    """
    positions = [index for index, wanted in enumerate(needed) if wanted]
    present = _present(cotangents)
    if not positions or not present:
        return [None] * len(inputs)

    def of_needed(*varying: Tensor) -> tuple[Tensor, ...]:
        outputs = fn(*_replace(inputs, positions, varying))
        return tuple(outputs[index] for index in present)

    pullback = torch.func.vjp(of_needed, *(inputs[index] for index in positions))[1]
    return _replace([None] * len(inputs), positions, pullback(tuple(cotangents[index] for index in present)))


def _present(values: Sequence[Any]) -> list[int]:
    return [index for index, value in enumerate(values) if value is not None]


def _replace(values: Sequence[Any], positions: Sequence[int], parts: Sequence[Any]) -> list[Any]:
    """A copy of `values` with `parts` at `positions`."""
    replaced = list(values)
    for position, part in zip(positions, parts, strict=True):
        replaced[position] = part
    return replaced
