"""AdamW of one leaf, a part at a time and in place: for weights in bfloat16, moments in 8 bits, and updates inside the
backward pass.

Beside parameters, gradients and state a step needs a few parts of `PART` numbers, whatever the model's size.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import leafwise, tree
from functional_sd3.core.rounding import LeafRounding, Rounding, as_rounding, stochastic_bfloat16
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.training.optim import blockwise
from functional_sd3.training.optim.types import CountState, ScaledGradients, UpdateLeaf
from functional_sd3.training.schedules import Schedule, as_schedule

PART = 4096 * blockwise.BLOCK


class AdamStep(NamedTuple):
    """One step of AdamW: its number (), from 1; learning rate (); and the constants of the rule. scale ():
    factor on the gradients, None for 1."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    rate: Tensor
    b1: float
    b2: float
    eps: float
    decay: float
    scale: Tensor | None = None


def adamw_rule(
    rate: float | Schedule, b1: float, b2: float, eps: float, decay: float, mask: tree.Chooser
) -> Callable[[Any, Params], tuple[UpdateLeaf, Any]]:
    """`Optimizer.by_leaf` of AdamW, whose state is that of `adamw`."""
    schedule = as_schedule(rate)

    def by_leaf(state: Any, params: Params) -> tuple[UpdateLeaf, Any]:
        adam_state, decay_state, counted = state
        weights, count = tree.flatten_paths(params), adam_state.count + 1
        decayed = set(tree.select(params, mask)) if decay else set()
        numbers = {path: number for number, path in enumerate(weights)}
        now = schedule(counted.count)

        def update_leaf(
            path: str, gradient: Tensor, scale: Tensor | None = None, key: Key | Rounding | None = None
        ) -> None:
            step = AdamStep(count, now, b1, b2, eps, decay if path in decayed else 0.0, scale)
            own = None if key is None else as_rounding(key).leaf(numbers[path], path)
            update_inplace(
                path, weights[path], gradient, at(adam_state.mean, path), at(adam_state.square, path), step, own
            )

        return update_leaf, (adam_state._replace(count=count), decay_state, CountState(counted.count + 1))

    return by_leaf


def donated(
    by_leaf: Callable[[Any, Params], tuple[UpdateLeaf, Any]],
) -> Callable[[ScaledGradients, Any, Params, Key | Rounding | None], tuple[Params, Any]]:
    """`Optimizer.donate` of a rule that updates one leaf after the other."""

    def donate(
        gradients: ScaledGradients, state: Any, params: Params, key: Key | Rounding | None = None
    ) -> tuple[Params, Any]:
        update_leaf, after = by_leaf(state, params)
        for path, gradient in tree.flatten_paths(gradients.tree).items():
            update_leaf(path, gradient, gradients.scale, key)
        return params, after

    return donate


def update_inplace(
    path: str,
    weight: Tensor,
    gradient: Tensor,
    mean: Tree,
    square: Tree,
    step: AdamStep,
    key: LeafRounding | None = None,
) -> None:
    """weight <- weight - rate (direction + decay weight), and both moments, written into their memory.

    weight: float32, bfloat16 or float64, contiguous. gradient: of any dtype. mean, square: tensors like the weight, or
    stored by `blockwise`. key: rounds a weight in bfloat16 stochastically; without one to nearest.
    """
    if not weight.is_contiguous():
        raise ValueError(f"{path} has gaps in memory, or another order than its moments; make it contiguous")
    weights, gradients = weight.view(-1), gradient.detach().reshape(-1)
    block = 1 if isinstance(mean, Tensor) else blockwise.block_of(mean)
    size = max(PART // block, 1) * block
    for start in range(0, len(weights), size):
        part = slice(start, start + size)
        grad = gradients[part].to(torch.promote_types(weight.dtype, torch.float32))
        direction, means, squares = _adam(grad, _read(mean, part, True), _read(square, part, False), step)
        _write(mean, part, means, signed=True)
        _write(square, part, squares, signed=False)
        old = weights[part].to(grad.dtype)
        weights[part] = rounded(old * (1 - step.rate * step.decay) - step.rate * direction, weight.dtype, key, start)


def average_inplace(average: Tensor, end: Tensor, weight: Tensor, key: LeafRounding | None = None) -> None:
    """average <- average + weight (end - average), in float32 and rounded once; weight ()."""
    averages, ends = average.view(-1), end.reshape(-1)
    for start in range(0, len(averages), PART):
        part = slice(start, start + PART)
        mixed = torch.lerp(averages[part].float(), ends[part].float(), weight.float())
        averages[part] = rounded(mixed, average.dtype, key, start)


def rounded(values: Tensor, dtype: torch.dtype, key: LeafRounding | None, start: int = 0) -> Tensor:
    """Values in `dtype`; with a key stochastically where that is bfloat16, else to nearest."""
    if key is None or dtype != torch.bfloat16:
        return values.to(dtype)
    return stochastic_bfloat16(key.key, values.float(), start, key.positions)


def adam(grad: Tensor, mean: Tree, square: Tree, step: AdamStep) -> tuple[Tensor, Tree, Tree]:
    """Direction and both moments as they are stored, of a whole leaf, as new tensors."""
    if isinstance(mean, Tensor):
        return _adam(grad, mean, square, step)
    parts, block = slice(0, grad.numel()), blockwise.block_of(mean)
    direction, means, squares = _adam(grad.reshape(-1), _read(mean, parts, True), _read(square, parts, False), step)
    stored = [
        _shaped(blockwise.quantize(values, signed=signed, block=block), mean)
        for values, signed in ((means, True), (squares, False))
    ]
    return direction.reshape(grad.shape), *stored


def _adam(grad: Tensor, mean: Tensor, square: Tensor, step: AdamStep) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad if step.scale is None else grad * step.scale
    biases = bias(step.b1, step.count), bias(step.b2, step.count)
    directions, means, squares = leafwise.adam([grad], [mean], [square], *biases, step.b1, step.b2, step.eps)
    return directions[0], means[0], squares[0]


def bias(beta: float, count: Tensor) -> Tensor:
    """1 - beta^n without its cancellation, which costs four of float32's seven digits at n = 1."""
    return -torch.expm1(count.float() * math.log(beta)) if beta else torch.ones_like(count, dtype=torch.float32)


def at(nested: Tree, path: str) -> Tree:
    """The part of a tree at a path."""
    for name in path.split("."):
        nested = nested[int(name)] if isinstance(nested, list | tuple) else nested[name]
    return nested


def _read(moment: Tree, part: slice, signed: bool) -> Tensor:
    if isinstance(moment, Tensor):
        return moment.view(-1)[part]
    return blockwise.dequantize(_part(moment, part), signed=signed, block=blockwise.block_of(moment))


def _write(moment: Tree, part: slice, values: Tensor, *, signed: bool) -> None:
    if isinstance(moment, Tensor):
        moment.view(-1)[part] = values
        return
    stored = blockwise.quantize(values, signed=signed, block=blockwise.block_of(moment))
    place = _part(moment, part)
    for name, leaf in stored.items():
        place[name].copy_(leaf)


def _part(moment: Tree, part: slice) -> Tree:
    """Views of the codes and scales of some numbers, which begin and end with blocks."""
    block = blockwise.block_of(moment)
    first, last = part.start // block, -(-part.stop // block)
    return {"codes": moment["codes"].view(-1)[part], "scale": moment["scale"].view(-1)[first:last]}


def _shaped(stored: Tree, like: Tree) -> Tree:
    return {name: leaf.reshape(like[name].shape) for name, leaf in stored.items()}
