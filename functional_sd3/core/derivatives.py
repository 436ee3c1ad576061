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


def joined_heads(
    projected: Sequence[Tensor], weights: Sequence[Tensor], heads: int, width: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of several streams in one tensor each, as joint attention reads them, (batch, heads, all
    tokens, head_dim); only those who ask are among the queries.

    projected: a stream's queries, keys and values side by side (batch, tokens, 3 * width), or its keys and values
    alone, (batch, tokens, 2 * width). weights: of the RMS norms of queries and keys (of the keys alone where there are
    no queries), stream by stream, each (head_dim,); or none. What is normed and turned is written where it is read, and
    backwards into the gradient of `projected`, which saves the passes that put them side by side.
    """
    return _JoinedHeads.apply(heads, width, eps, len(projected), *projected, *weights)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return cpu.product(x, weight, bias)

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
        before = cpu.product(x, weight, bias)
        hidden = cpu.gelu_tanh(before) if cpu.has_gelu_tanh(before) else F.gelu(before, approximate="tanh")
        ctx.save_for_backward(x, weight, bias, out_weight, out_bias, before, hidden)
        return cpu.product(hidden, out_weight, out_bias)

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
        _sum_of_rows(gradient, gradient.new_ones(len(gradient))) if to_bias else None,
    )


def _sum_of_rows(rows: Tensor, factors: Tensor) -> Tensor:
    """Of factor times row: a product, which is three times as fast as a sum over rows, but adds one after another; so
    block by block, that rounding does not grow with the rows."""
    whole = len(rows) // _BLOCK * _BLOCK
    total = rows[whole:].t().mv(factors[whole:])
    if whole:
        blocks = factors[:whole].view(-1, 1, _BLOCK).bmm(rows[:whole].reshape(-1, _BLOCK, rows.shape[-1]))
        total = total.add_(blocks.sum((0, 1)))
    return total


_BLOCK = 4096


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
        to_x, *needed = ctx.needs_input_grad
        found_x = gradient.sum_to_size(ctx.shape) if to_x else None
        small, large = (a, b) if a.numel() < b.numel() else (b, a)
        if _is_watched(gradient) or not all(needed) or small.shape == gradient.shape:
            pairs = zip(needed, (a, b), (b, a), strict=True)
            found = ((gradient * factor).sum_to_size(own.shape) if need else None for need, own, factor in pairs)
            return found_x, *found
        # A product of which only the sum is wanted is in the cache, as fresh memory is not.
        product = gradient * large
        to_small = product.sum_to_size(small.shape)
        to_large = torch.mul(gradient, small, out=product).sum_to_size(large.shape)
        return found_x, *((to_small, to_large) if small is a else (to_large, to_small))


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Found:
        x, weight, inverse = ctx.saved_tensors
        if _is_watched(gradient):
            formula = lambda *inputs: rms_norm_formula(*inputs, ctx.eps)  # noqa: E731
            return (*_again(formula, ctx, (x, weight), gradient), None)
        return (*_norm_gradients(x, weight, inverse, gradient), None)


def normed(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`rms_norm` of what nobody watches, in `out` where it is given; and 1 / rms."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x, inverse, out=out).mul_(weight), inverse


def _norm_gradients(
    x: Tensor, weight: Tensor, inverse: Tensor, gradient: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of x, in `out` where it is given, and of the weight."""
    # As rows, whatever the order of the inputs, for sums that are products with a vector.
    product = torch.mul(x, gradient, out=x.new_empty(x.shape))
    rows = product.flatten(0, -2)
    to_weight = _sum_of_rows(rows, inverse.flatten())
    # inverse (weight gradient - x inverse^2 mean(weight gradient x))
    mean = rows.mv(weight).view(inverse.shape).mul_(inverse.square()).div_(-x.shape[-1])
    torch.mul(gradient, weight, out=product).addcmul_(x, mean)
    return torch.mul(product, inverse, out=product if out is None else out), to_weight


class _JoinedHeads(Function):
    @staticmethod
    def forward(ctx: Any, heads: int, width: int, eps: float, streams: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        found, inverses = joined(inputs[:streams], inputs[streams:], heads, width, eps)
        ctx.save_for_backward(*inputs, *inverses)
        ctx.settings = streams, heads, width, eps
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Found:
        streams, heads, width, eps = ctx.settings
        saved, count = ctx.saved_tensors, len(ctx.needs_input_grad) - _SETTINGS  # read once, as checkpoints ask for
        inputs, inverses = saved[:count], iter(saved[count:])
        projected, weights = inputs[:streams], inputs[streams:]
        if any(map(_is_watched, gradients)):
            formula = lambda *given: joined_heads_formula(given[:streams], given[streams:], heads, width, eps)  # noqa: E731
            return *[None] * _SETTINGS, *_again(formula, ctx, inputs, gradients, _SETTINGS)
        to_projected, to_weights = [torch.empty_like(x) for x in projected], []
        given = _parts(projected, heads, width), _norms(projected, weights, width), _places(gradients, projected, width)
        for part, weight, gradient, out in zip(*given, _parts(to_projected, heads, width), strict=True):
            if weight is None:
                out.copy_(gradient)
            else:
                to_weights.append(_norm_gradients(part, weight, next(inverses), gradient, out=out)[1])
        return *[None] * _SETTINGS, *to_projected, *to_weights


_SETTINGS = 4


def joined(
    projected: Sequence[Tensor], weights: Sequence[Tensor], heads: int, width: int, eps: float
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """`joined_heads` of what nobody watches; and 1 / rms of what is normed."""
    tokens, inverses = [x.shape[1] for x in projected], []
    asking = [x.shape[1] for x in projected if x.shape[-1] == 3 * width]
    like, batch = projected[0], len(projected[0])
    found = [like.new_empty(batch, heads, sum(counts), width // heads) for counts in (asking, tokens, tokens)]
    given = _parts(projected, heads, width), _norms(projected, weights, width), _places(found, projected, width)
    for part, weight, place in zip(*given, strict=True):
        if weight is None:
            place.copy_(part)
        else:
            inverses.append(normed(part, weight, eps, place)[1])
    return tuple(found), inverses


def _parts(projected: Sequence[Tensor], heads: int, width: int) -> list[Tensor]:
    """Queries (of those who ask), keys and values, stream by stream: (batch, tokens, heads, head_dim)."""
    return [part for x in projected for part in x.unflatten(-1, (-1, heads, width // heads)).unbind(2)]


def _norms(projected: Sequence[Tensor], weights: Sequence[Tensor], width: int) -> list[Tensor | None]:
    """What each of `_parts` is normed by: all queries and keys or none, no values."""
    remaining, norms = iter(weights), []
    for x in projected:
        norms += [next(remaining) if weights else None for _ in range(x.shape[-1] // width - 1)] + [None]
    return norms


def _places(whole: Sequence[Tensor], projected: Sequence[Tensor], width: int) -> list[Tensor]:
    """Where each of `_parts` stands in the queries, keys and values of all streams, or in their gradients."""
    starts, places = [0, 0, 0], []
    for x in projected:
        for index in range(3 - x.shape[-1] // width, 3):
            places.append(whole[index].narrow(2, starts[index], x.shape[1]).transpose(1, 2))
            starts[index] += x.shape[1]
    return places


def joined_heads_formula(
    projected: Sequence[Tensor], weights: Sequence[Tensor], heads: int, width: int, eps: float
) -> tuple[Tensor, ...]:
    """The same for whatever looks into it."""
    found: list[list[Tensor]] = [[], [], []]
    parts, norms = iter(_parts(projected, heads, width)), iter(_norms(projected, weights, width))
    for x in projected:
        for index in range(3 - x.shape[-1] // width, 3):
            part, weight = next(parts).transpose(1, 2), next(norms)
            found[index].append(part if weight is None else rms_norm_formula(part, weight, eps))
    return tuple(torch.cat(each, dim=2) for each in found)


def _is_watched(gradient: Tensor) -> bool:
    """Whether a backward pass is differentiated or mapped itself."""
    return torch.is_grad_enabled() or not is_ordinary(gradient)


def _again(
    formula: Callable[..., Any], ctx: Any, inputs: Sequence[Tensor], gradient: Tensor | Sequence[Tensor], first: int = 0
) -> Found:
    """The backward pass that autograd makes of the formula, which can be differentiated and mapped; `first`: where the
    inputs stand in what the function was given."""
    differentiated = torch.is_grad_enabled()
    needs = ctx.needs_input_grad[first : first + len(inputs)]
    with torch.enable_grad():
        # Views: the gradient of each input itself, not through what the others were computed from.
        own = [x.view_as(x) if differentiated else x.detach().requires_grad_() for x in inputs]
        needed = [x for x, need in zip(own, needs, strict=True) if need]
        found = iter(torch.autograd.grad(formula(*own), needed, gradient, create_graph=differentiated))
    return tuple(next(found) if need else None for need in needs)
