"""Gradients through a run of the flow: checkpointed steps (discretise, then differentiate) and the continuous adjoint.

Noise, prompt embeddings, a guidance scale, a LoRA and the times have gradients, computed in three ways:

    plain         integrate(HEUN, velocity, x, times)                  exact; keeps all that every evaluation keeps
    checkpointed  integrate(checkpointed(HEUN), velocity, x, times)    the same numbers; keeps one state a step
    continuous    continuous(HEUN, field, args, x, times)              of the exact flow; keeps the end alone

The first two differentiate the steps that were taken. The third differentiates the flow itself, by a second flow that
runs back from the end (Chen et al. 2018, arXiv:1806.07366), and agrees with them as far as the steps have converged.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import transform, tree
from functional_sd3.core.types import Tree, Velocity
from functional_sd3.flow import ode
from functional_sd3.flow.ode.embedded import Adaptive
from functional_sd3.flow.ode.method import Advance, Method
from functional_sd3.flow.times import Times, checked, is_readable

Field = Callable[[Tree, Tensor, Tensor], Tensor]
"""A velocity with its arguments in the open: `(args, x (batch, ...), t) -> dx/dt`, args a tree of float tensors."""


def checkpointed(method: Method) -> Method:
    """Gradient checkpointing: the method with its steps recomputed in the backward pass; equal gradients, less memory.

    The backward pass keeps x, t and the method's carry between the steps, and what one step keeps while it is
    differentiated. A velocity may close over what is differentiated. Saves memory under autograd and every transform of
    torch.func (see `transform.remat`). Raises ValueError for an adaptive method, whose recomputed steps could differ:
    `continuous` takes those.
    """
    if isinstance(method, Adaptive):
        raise ValueError(f"{method.name} chooses its steps, and recomputed ones could differ: use `continuous`")

    def step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, carry: Tree) -> Advance:
        return transform.remat(method.step)(velocity, x, t, t_next, carry)

    return method._replace(step=step, last=method.last and checkpointed(method.last))


def continuous(
    method: Method | Adaptive,
    field: Field,
    args: Tree,
    x: Tensor,
    times: Times,
    *,
    backward: Method | Adaptive | None = None,
    backward_times: Times | None = None,
    **options: Any,
) -> Tensor:
    """x at times[-1], differentiated by the continuous adjoint: `integrate(method, partial(field, args), x, times)`.

    With a = dL/dx: from the end back to the start, da/dt = -(dv/dx)^T a and dg/dt = -(dv/dargs)^T a, g = 0 at the end,
    beside dx/dt = v, which recomputes the states that were not kept (Chen et al. 2018, eq. 4, 5 and algorithm 1).
    Gradients reach args (a tree of float tensors, which may be empty), x, and of `times` the two ends: an exact flow
    does not depend on the times between. Tensors that `field` closes over get none. To learn a grid use `checkpointed`.

    times: (n + 1,), one grid for all samples. backward, backward_times: the method and the grid of the backward
    integration, from times[-1] to times[0]; by default `method` and `times` reversed. options: further ones of
    `ode.integrate`, such as tolerances, for both. The gradient's error falls with the order of the method, and it is
    not the gradient of the discrete steps. Flows that generate contract, so the backward integration amplifies the
    errors of x, above all with few steps. Each of its evaluations costs one of `field` and one backward pass.

    Works under autograd, `transform.value_and_grad`, `torch.func.grad` and `vjp`, `vmap`, and for second derivatives.
    The memory is that of one evaluation for the first two; `torch.func.grad` and second derivatives keep the whole
    backward integration. No forward mode (`torch.func.jvp` of the plain run keeps nothing anyway), and not under
    `torch.compile`, which cannot hold functions for a backward pass: compile `field` instead, and differentiate by
    `value_and_grad`.
    Raises ValueError for grids of the wrong shape, and for arguments that are not float tensors.
    """
    grid, back = _grids(times, backward_times, x)
    for path, leaf in tree.flatten_paths(args).items():
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(f"{path or 'args'} is {kind}; args are float tensors: let the field close over the rest")
    leaves = tree.leaves(args)

    def of_leaves(leaves: list[Tensor], x: Tensor, t: Tensor) -> Tensor:
        given = iter(leaves)
        return field(tree.map(lambda _: next(given), args), x, t)

    def forward(leaves: list[Tensor], x: Tensor, grid: Tensor) -> Tensor:
        return ode.integrate(method, partial(of_leaves, leaves), x, grid, **options)

    def integrate_backward(velocity: Velocity, state: Tensor, grid: Tensor) -> Tensor:
        return ode.integrate(backward or method, velocity, state, grid, **options)

    return _Flow.apply(forward, integrate_backward, of_leaves, grid, back, x, *leaves)


class _Flow(torch.autograd.Function):
    """(grid, x, leaves) -> x at the end. All tensors are arguments, as torch.func requires."""

    generate_vmap_rule = True

    @staticmethod
    def forward(integrate, integrate_backward, field, grid, back, x, *leaves):
        return integrate(list(leaves), x, grid)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.integrate_backward, ctx.field, grid, back, x, *leaves = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(output, grid, back, *leaves)

    @staticmethod
    def backward(ctx, adjoint):
        end, grid, back, *leaves = ctx.saved_tensors
        needs_grad = list(ctx.needs_input_grad[6:])
        inputs = [leaf for leaf, needs in zip(leaves, needs_grad, strict=True) if needs]

        def field(some: list[Tensor], x: Tensor, t: Tensor) -> Tensor:
            given = iter(some)
            every = [next(given) if needs else leaf for leaf, needs in zip(leaves, needs_grad, strict=True)]
            return ctx.field(every, x, t).to(x.dtype)

        start, first, grads = _backward(ctx.integrate_backward, field, inputs, end, adjoint, back)
        ends = None
        if ctx.needs_input_grad[3]:
            # dL/dt_N = a_N v_N and dL/dt_0 = -a_0 v_0: a later start shortens the flow.
            at_end = (adjoint * field(inputs, end, grid[-1])).sum()
            at_start = -(first * field(inputs, start, grid[0])).sum()
            ends = torch.cat([at_start[None], torch.zeros_like(grid[1:-1]), at_end[None]])
        given = iter(grads)
        of_leaves = [next(given) if needs else None for needs in needs_grad]
        return None, None, None, ends, None, first.to(ctx.dtype), *of_leaves


def _backward(integrate, field, leaves, end, adjoint, back) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x and dL/dx at the start, and dL/dleaves, by integrating (x, a, g) as one vector."""
    parts = [end, adjoint, *(torch.zeros_like(leaf) for leaf in leaves)]

    def augmented(state: Tensor, t: Tensor) -> Tensor:
        x, a, *_ = _unflatten(state, parts)

        def pairing(leaves: list[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
            slope = field(leaves, x, t.reshape(()))
            return (a * slope).sum(), slope

        (of_leaves, of_x), (_, slope) = transform.value_and_grad(pairing, (0, 1), has_aux=True)(leaves, x)
        return _flatten([slope, -of_x, *(-grad for grad in of_leaves)], state.dtype)

    # One row: the error norm of an adaptive method is then that of the whole vector.
    state = integrate(augmented, _flatten(parts, end.dtype), back)
    start, first, *grads = _unflatten(state, parts)
    return start, first, [grad.to(leaf.dtype) for grad, leaf in zip(grads, leaves, strict=True)]


def _flatten(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.to(dtype).reshape(1, -1) for part in parts], 1)


def _unflatten(state: Tensor, parts: list[Tensor]) -> list[Tensor]:
    pieces = state.reshape(-1).split([part.numel() for part in parts])
    return [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def _grids(times: Times, backward_times: Times | None, x: Tensor) -> tuple[Tensor, Tensor]:
    grid = checked(times, x)
    back = grid.flip(0).detach() if backward_times is None else checked(backward_times, x).detach()
    if grid.ndim != 1 or back.ndim != 1:
        raise ValueError(
            f"times have shape {tuple(grid.shape)} and backward_times {tuple(back.shape)}; the continuous adjoint "
            "takes one grid for all samples, (steps + 1,): use `checkpointed` for a grid of each sample's own"
        )
    if is_readable(grid) and is_readable(back) and not (back[0] == grid[-1] and back[-1] == grid[0]):
        raise ValueError(
            f"backward_times go from {back[0]:.6g} to {back[-1]:.6g}; they must go from the end of times, "
            f"{grid[-1]:.6g}, back to the start, {grid[0]:.6g}"
        )
    return grid, back
