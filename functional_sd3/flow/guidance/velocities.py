"""A guidance applied to velocity fields: `guided` makes one field of several; classifier-free guidance in one batch."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Tree, Velocity
from functional_sd3.flow.evaluation import evaluate_field
from functional_sd3.flow.guidance.combine import extrapolate
from functional_sd3.flow.guidance.compose import (
    Guidance,
    Scale,
    Velocities,
    check_scale,
    is_one,
    value,
)
from functional_sd3.flow.ode.embedded import Adaptive
from functional_sd3.flow.ode.method import Advance, Method, no_carry

VelocityFields = Mapping[str, Velocity] | Callable[[Tensor, Tensor], Velocities]
"""Velocity fields by name, evaluated one by one, or `(x, t)` -> all of their velocities (`pipeline.velocities`)."""

StatefulVelocity = Callable[[Tensor, Tensor, Tree], tuple[Tensor, Tree]]
"""A velocity that carries a state: `(x, t, carry)` -> dx/dt and the next carry."""


def guided(guidance: Guidance, fields: VelocityFields) -> Velocity:
    """Guided velocity field. Raises ValueError where a field is missing, and for a guidance that carries a state."""
    if guidance.init is not no_carry:
        raise ValueError("this guidance carries a state: use `guided_with_carry`, and `with_carry` of the method")
    velocity = guided_with_carry(guidance, fields)
    return lambda x, t: velocity(x, t, [])[0]


def guided_with_carry(guidance: Guidance, fields: VelocityFields) -> StatefulVelocity:
    """Guided velocity field whose carry is an argument and a result; `guidance.init(x, t)` is the first carry."""
    if callable(fields):
        return lambda x, t, carry: guidance.combine(fields(x, t), x, t, carry)
    missing = sorted(guidance.needs.keys() - fields.keys())
    if missing:
        raise ValueError(f"guidance needs the velocities {sorted(guidance.needs)}; there is none for {missing}")

    def velocity(x: Tensor, t: Tensor, carry: Tree) -> tuple[Tensor, Tree]:
        return guidance.combine({name: evaluate_field(fields[name], x, t) for name in guidance.needs}, x, t, carry)

    return velocity


def with_carry(method: Method | Adaptive, guidance: Guidance) -> Method:
    """The method for a `StatefulVelocity` of `guidance`, for `ode.integrate` and `ode.run`.

    Its carry is {"method", "velocity"}, saved and resumed like any other. The velocity's part passes from one
    evaluation to the next, in the method's order. Raises ValueError for an adaptive method, whose rejected attempts
    would change it.
    """
    if isinstance(method, Adaptive):
        raise ValueError(f"{method.name} may reject steps, and a guidance that carries a state cannot undo one")

    def init(x: Tensor, t: Tensor) -> Tree:
        return {"method": method.init(x, t), "velocity": guidance.init(x, t)}

    # velocity is a StatefulVelocity, which the type of `Method.step` cannot express.
    def step(velocity: Any, x: Tensor, t: Tensor, t_next: Tensor, carry: Tree) -> Advance:
        carried = carry["velocity"]

        # end: r, of a method of mean velocities.
        def evaluate(x: Tensor, t: Tensor, *end: Tensor) -> Tensor:
            nonlocal carried
            dx, carried = velocity(x, t, *end, carried)
            return dx

        # An empty carry leaves no tensor in a file.
        advance = method.step(evaluate, x, t, t_next, carry.get("method", []))
        return advance._replace(carry={"method": advance.carry, "velocity": carried})

    last = None if method.last is None else with_carry(method.last, guidance)
    # The transition would be that of a velocity without a state.
    return method._replace(init=init, step=step, last=last, transition=None)


def classifier_free(velocity: Velocity, uncond_velocity: Velocity, scale: Scale) -> Velocity:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): v_u + scale (v_c - v_u).

    scale 1 is the conditional velocity, 0 the unconditional, more than 1 goes beyond the condition; Python's 1 costs no
    unconditional evaluation. For one evaluation of a batch of both see `batched`.
    """
    check_scale(scale)
    if is_one(scale):
        return velocity

    def guided(x: Tensor, t: Tensor) -> Tensor:
        fields = evaluate_field(uncond_velocity, x, t), evaluate_field(velocity, x, t)
        return extrapolate(*fields, value(scale, t))

    return guided


def batched(
    fn: Callable[..., Tensor], uncond_args: tuple[Tree, ...], cond_args: tuple[Tree, ...], scale: Scale
) -> Velocity:
    """`classifier_free` of `fn(x, t, *args)` in one evaluation, of the batch [unconditional, conditional].

    args: trees of tensors whose first dimension is the batch (context, pooled), the same structure in both; they are
    joined here, once for a whole run. fn gets x (2 batch, ...), t () or (2 batch,). Python's scale 1 evaluates the
    conditional half alone.
    """
    check_scale(scale)
    if is_one(scale):
        return lambda x, t: fn(x, t, *cond_args)
    fields = batch_fields(fn, {"uncond": uncond_args, "cond": cond_args})

    def guided(x: Tensor, t: Tensor) -> Tensor:
        velocities = fields(x, t)
        return extrapolate(velocities["uncond"], velocities["cond"], value(scale, t))

    return guided


def batch_fields(
    fn: Callable[..., Tensor], arguments: Mapping[str, tuple[Tree, ...]]
) -> Callable[..., dict[str, Tensor]]:
    """`fn(x, t, *args)` for several args in one evaluation: (x, t, **options of fn) -> {name: velocity}.

    arguments: for each name trees of tensors whose first dimension is the batch, joined here in their order, once for
    a whole run. fn gets x (n batch, ...) and t () or (n batch,).
    """
    names = list(arguments)
    if len(names) == 1:
        return lambda x, t, **options: {names[0]: fn(x, t, *arguments[names[0]], **options)}
    joined = tree.map(lambda *parts: torch.cat(parts), *(tuple(arguments[name]) for name in names))

    def evaluate(x: Tensor, t: Tensor, **options: Any) -> dict[str, Tensor]:
        count = len(names)
        stacked = fn(torch.cat([x] * count), torch.cat([t] * count) if t.ndim else t, *joined, **options)
        return dict(zip(names, stacked.chunk(count), strict=True))

    return evaluate
