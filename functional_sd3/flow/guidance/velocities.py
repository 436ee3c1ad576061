"""A guidance applied to velocity fields: `guided` makes one field of several; classifier-free guidance in one batch."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Tree, Velocity
from functional_sd3.flow.guidance.combine import extrapolate
from functional_sd3.flow.guidance.compose import (
    Answers,
    Guidance,
    Scale,
    check_scale,
    is_one,
    value,
)
from functional_sd3.flow.ode.method import Advance, Method, no_memory

Velocities = Mapping[str, Velocity] | Callable[[Tensor, Tensor], Answers]
"""Velocities by name, evaluated one after the other, or `(x, t)` -> what they all answer (`pipeline.velocities`)."""

Remembering = Callable[[Tensor, Tensor, Tree], tuple[Tensor, Tree]]
"""A velocity with a memory: `(x, t, memory)` -> dx/dt and the memory after it."""


def guided(guidance: Guidance, velocities: Velocities) -> Velocity:
    """The velocity that a guidance makes of others. Raises ValueError where one is missing or it has a memory."""
    if guidance.init is not no_memory:
        raise ValueError("this guidance has a memory: use `remembering`, and `with_memory` of the method")
    velocity = remembering(guidance, velocities)
    return lambda x, t: velocity(x, t, [])[0]


def remembering(guidance: Guidance, velocities: Velocities) -> Remembering:
    """As `guided`, with the memory an argument and a result; `guidance.init(x, t)` is the first."""
    if callable(velocities):
        return lambda x, t, memory: guidance.combine(velocities(x, t), x, t, memory)
    missing = sorted(guidance.needs.keys() - velocities.keys())
    if missing:
        raise ValueError(f"guidance needs the velocities {sorted(guidance.needs)}; there is none for {missing}")

    def velocity(x: Tensor, t: Tensor, memory: Tree) -> tuple[Tensor, Tree]:
        return guidance.combine({name: velocities[name](x, t) for name in guidance.needs}, x, t, memory)

    return velocity


def with_memory(method: Method, guidance: Guidance) -> Method:
    """The method for velocities that remember as `guidance` does (`Remembering`): for `ode.integrate` and `ode.run`.

    Both memories are the run's: {"method", "velocity"}, written to disk and taken up again like any. The velocity's
    goes from one evaluation to the next, in the order in which the method asks. Raises ValueError for an adaptive
    method, whose rejected attempts would be remembered.
    """
    if not isinstance(method, Method):
        raise ValueError(f"{method.name} tries steps and takes them back, but a guidance with a memory would remember")

    def init(x: Tensor, t: Tensor) -> Tree:
        return {"method": method.init(x, t), "velocity": guidance.init(x, t)}

    def step(velocity: Remembering, x: Tensor, t: Tensor, t_next: Tensor, memory: Tree) -> Advance:
        carried = memory["velocity"]

        def remembered(x: Tensor, t: Tensor) -> Tensor:
            nonlocal carried
            answer, carried = velocity(x, t, carried)
            return answer

        # A memory that was on disk has lost what was empty.
        advance = method.step(remembered, x, t, t_next, memory.get("method", []))
        return advance._replace(memory={"method": advance.memory, "velocity": carried})

    last = None if method.last is None else with_memory(method.last, guidance)
    return method._replace(init=init, step=step, last=last)


def classifier_free(velocity: Velocity, uncond_velocity: Velocity, scale: Scale) -> Velocity:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): v_u + scale (v_c - v_u).

    scale 1 is the conditional velocity, 0 the unconditional, more than 1 goes beyond the condition; Python's 1 costs no
    unconditional evaluation. For one evaluation of a batch of both see `batched`.
    """
    check_scale(scale)
    if is_one(scale):
        return velocity

    def guided(x: Tensor, t: Tensor) -> Tensor:
        return extrapolate(uncond_velocity(x, t), velocity(x, t), value(scale, t))

    return guided


def batched(
    fn: Callable[..., Tensor], uncond_args: tuple[Tree, ...], cond_args: tuple[Tree, ...], scale: Scale
) -> Velocity:
    """`classifier_free` of `fn(x, t, *args)` in one evaluation, of the batch [unconditional, conditional].

    args: trees of tensors whose first dimension is the batch (context, pooled), the same structure in both; they are
    joined here, once for a whole run. fn sees x (2 batch, ...), t () or (2 batch,). Python's scale 1 evaluates the
    conditional half alone.
    """
    check_scale(scale)
    if is_one(scale):
        return lambda x, t: fn(x, t, *cond_args)
    answers = together(fn, {"uncond": uncond_args, "cond": cond_args})

    def guided(x: Tensor, t: Tensor) -> Tensor:
        answer = answers(x, t)
        return extrapolate(answer["uncond"], answer["cond"], value(scale, t))

    return guided


def together(fn: Callable[..., Tensor], arguments: Mapping[str, tuple[Tree, ...]]) -> Callable[[Tensor, Tensor], dict]:
    """`fn(x, t, *args)` for several args in one evaluation: (x, t) -> {name: answer}.

    arguments: for each name trees of tensors whose first dimension is the batch, joined here in their order, once for
    a whole run. fn sees x (n batch, ...) and t () or (n batch,).
    """
    names = list(arguments)
    if len(names) == 1:
        return lambda x, t: {names[0]: fn(x, t, *arguments[names[0]])}
    joined = tree.map(lambda *parts: torch.cat(parts), *(tuple(arguments[name]) for name in names))

    def answers(x: Tensor, t: Tensor) -> dict[str, Tensor]:
        count = len(names)
        answer = fn(torch.cat([x] * count), torch.cat([t] * count) if t.ndim else t, *joined)
        return dict(zip(names, answer.chunk(count), strict=True))

    return answers
