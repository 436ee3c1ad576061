"""A run of a method over a grid of times: a fold of its step, whole (`integrate`) or in parts (`run`)."""

from collections.abc import Callable, Collection
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.sequences import equal_runs
from functional_sd3.core.types import Velocity
from functional_sd3.flow.ode import adaptive, tolerances
from functional_sd3.flow.ode.embedded import Adaptive
from functional_sd3.flow.ode.method import Method, State, StepInfo
from functional_sd3.flow.path import denoised
from functional_sd3.flow.stepwise import RunVelocity, Stepwise, at_step
from functional_sd3.flow.times import Times, checked

Saved = TypeVar("Saved")
Save = Literal["all"] | Collection[int] | Callable[[StepInfo], Any]
OnStep = Callable[[StepInfo], Any]


class NonFiniteError(ArithmeticError):
    """The state is not finite after step `index` (0 is the first), from time `t`; `state` is the last good one."""

    def __init__(self, index: int, steps: int, state: State):
        times = ", ".join(f"{time:.6g}" for time in state.t.detach().flatten().tolist())
        super().__init__(f"step {index + 1} of {steps}, from t = {times}, gave values that are not finite")
        self.index, self.t, self.state = index, state.t, state


@overload
def integrate(
    method: Method | Adaptive,
    velocity: RunVelocity,
    x: Tensor,
    times: Times,
    *,
    save: Literal["all"] | Collection[int] | None = None,
    on_step: OnStep | None = None,
    check: bool = False,
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
) -> Tensor: ...
@overload
def integrate(
    method: Method | Adaptive,
    velocity: RunVelocity,
    x: Tensor,
    times: Times,
    *,
    save: Callable[[StepInfo], Saved],
    on_step: OnStep | None = None,
    check: bool = False,
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
) -> list[Saved]: ...


def integrate(
    method: Method | Adaptive,
    velocity: RunVelocity,
    x: Tensor,
    times: Times,
    *,
    save: Save | None = None,
    on_step: OnStep | None = None,
    check: bool = False,
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
) -> Tensor | list[Any]:
    """x at times[-1], from x at times[0], in len(times) - 1 steps, or in those that an adaptive method chooses.

    velocity: `(x (batch, ...) in the dtype of the state, t scalar or (batch,)) -> dx/dt`, or `Stepwise` ones, of which
    step i evaluates `velocity.at(i)`. An adaptive method restarts where neighbouring ones are not the same object.
    times: (n + 1,), descending to generate, ascending to invert, in [0, 1]; or (n + 1, batch), a grid for each sample,
    where shorter grids are padded by repeating their last time (`schedule.stack`) and a `last` step is that of the
    longest. An adaptive method chooses its own steps between the ends; the times in between are only where the
    solution is returned.
    save: None returns the last x (batch, ...); "all" the n + 1 states at `times`, (n + 1, batch, ...); indices into
    `times` those states only, stacked in the order given; a function the list of its results for each `StepInfo`.
    on_step: called with the `StepInfo` after each step; its result is ignored.
    check: raise `NonFiniteError` after the first step whose state is not finite (which waits for the device each step).
    rtol, atol: of an adaptive method, which raises `adaptive.StepFailed` where no step succeeds; default 1e-5 and 1e-6.

    Raises ValueError for what is no method, a velocity that is not of the shape of x, grids of the wrong shape and,
    where their values can be read (in CPU memory, not traced), for grids that are not monotone or leave [0, 1].
    """
    _check_method(method)
    grid = checked(times, x)
    steps = len(grid) - 1
    method = _toleranced(method, rtol, atol)
    state = start(method, x, grid[0])
    if save is None:
        return run(method, velocity, state, grid, on_step=on_step, check=check).x
    if callable(save):
        saved: list[Any] = []
        on_step = _both(on_step, lambda info: saved.append(save(info)))
        run(method, velocity, state, grid, on_step=on_step, check=check)
        return saved
    indices = range(steps + 1) if save == "all" else [_index(index, steps) for index in save]
    states = {0: state.x}

    def keep(info: StepInfo) -> None:
        if info.index + 1 in indices:
            states[info.index + 1] = info.x

    run(method, velocity, state, grid, on_step=_both(on_step, keep), check=check)
    return torch.stack([states[index] for index in indices])


def start(method: Method | Adaptive, x: Tensor, t: Tensor | float) -> State:
    """The state of a run before its first step: x in float32 (float64 if it is), t in the same dtype.

    Raises ValueError for what is no method.
    """
    _check_method(method)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return State(x, t, [] if isinstance(method, Adaptive) else method.init(x, t))


def step(method: Method | Adaptive, velocity: Velocity, state: State, t_next: Tensor | float) -> State:
    """One step of the method from state.t to t_next; as many as needed of an adaptive one."""
    t_next = torch.as_tensor(t_next, dtype=state.t.dtype, device=state.t.device)
    if isinstance(method, Adaptive):
        return run(method, velocity, state, torch.stack(torch.broadcast_tensors(state.t, t_next)))
    x, carry, _ = method.step(velocity, state.x, state.t, t_next, state.carry)
    return State(x, t_next, carry)


def finish(method: Method | Adaptive, velocity: Velocity, state: State, t_next: Tensor | float) -> State:
    """The last step of a run: `step`, or the step of `method.last` where there is one."""
    return step((None if isinstance(method, Adaptive) else method.last) or method, velocity, state, t_next)


def run(
    method: Method | Adaptive,
    velocity: RunVelocity,
    state: State,
    times: Times,
    *,
    on_step: OnStep | None = None,
    ends: bool = True,
    check: bool = False,
) -> State:
    """The state at times[-1], from the state at times[0]. Parts of a grid run one after the other give the whole run.

    So a run can pause after any step k (`times[: k + 1]`), be saved (`to_tensors`) and resume from there (`times[k:]`),
    with the same result to the bit; with a `Stepwise` velocity from `velocity.after(k)`. `ends`: True if the last of
    `times` is the end of the whole grid, where a method with a `last` step takes it; False for earlier parts.

    An adaptive method ends each part exactly at its last time and carries only its next step length: the parts equal
    the whole within the tolerance. To pause one anywhere, to the bit, use `adaptive.step`.
    """
    grid = checked(times, state.x)
    if isinstance(method, Adaptive):
        return _run_adaptive(method, velocity, state, grid, on_step)
    steps = len(grid) - 1
    for index, t_next in enumerate(grid[1:].unbind(0)):
        stepper = method.last if method.last and ends and index == steps - 1 else method
        x, carry, slope = stepper.step(at_step(velocity, index), state.x, state.t, t_next, state.carry)
        before, state = state, State(x, t_next, carry)
        if check and not torch.isfinite(x).all():
            raise NonFiniteError(index, steps, before)
        if on_step is not None:
            on_step(StepInfo(index, steps, state, denoised(before.x, slope, before.t)))
    return state


def to_tensors(state: State) -> dict[str, Tensor]:
    """A state as flat named tensors, for safetensors: x, t, carry.0.value, ..."""
    return tree.flatten_paths(state)


def from_tensors(tensors: dict[str, Tensor]) -> State:
    """The inverse of `to_tensors`."""
    nested = tree.unflatten_paths(tensors)
    return State(nested["x"], nested["t"], nested.get("carry", []))


def evaluations(method: Method, steps: int) -> int:
    """Number of velocity evaluations in a run of `steps` steps, counted by running the method on one number.

    Raises ValueError for an adaptive method, whose number depends on the velocity: `adaptive.solve` counts it.
    """
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float32, device="cpu")
    return sum(len(times) for times in evaluation_times(method, grid))


def evaluation_times(method: Method, times: Tensor, count: int = 1) -> list[Tensor]:
    """Times at which each step of a run evaluates the velocity, in order: (evaluations,), or (evaluations, batch) where
    times are (n + 1, batch).

    By a run on one number for each of `count` samples. Raises ValueError for an adaptive method, whose times depend on
    the velocity.
    """
    if isinstance(method, Adaptive):
        raise ValueError(f"{method.name} has no fixed number of evaluations; adaptive.solve counts them")
    return _evaluated(method, times, count, 0)


def evaluation_ends(method: Method, times: Tensor, count: int = 1) -> list[Tensor]:
    """The r of each evaluation of a mean velocity, `velocity(x, t, r)`, in a run, as `evaluation_times` of its t.

    Raises ValueError for a method that evaluates none.
    """
    if isinstance(method, Adaptive) or not method.mean:
        raise ValueError(f"{method.name} evaluates velocities of one time; ode.MEANFLOW evaluates mean velocities")
    return _evaluated(method, times, count, 1)


def _evaluated(method: Method, times: Tensor, count: int, which: int) -> list[Tensor]:
    """Times of the evaluations of each step: t (which = 0) or r (1)."""
    evaluated: list[list[Tensor]] = [[] for _ in range(len(times) - 1)]

    def recorder(step: int) -> Velocity:
        def record(x: Tensor, *at: Tensor) -> Tensor:
            evaluated[step].append(at[which])
            return x

        return record

    run(method, Stepwise(recorder), start(method, times.new_zeros(count), times[0]), times)
    return [torch.stack(each) if each else times[:0] for each in evaluated]


def _run_adaptive(method: Adaptive, velocity: RunVelocity, state: State, grid: Tensor, on_step: OnStep | None) -> State:
    """`run`, in parts of neighbouring steps that have the same velocity."""
    steps = len(grid) - 1
    for first, stop in equal_runs([at_step(velocity, index) for index in range(steps)]):
        part = grid[first : stop + 1] if on_step is not None else grid[[first, stop]]
        h = state.carry["h"] if state.carry else None
        report = None if on_step is None else _renumbered(on_step, first, steps)
        solution = adaptive.solve(method, at_step(velocity, first), state.x, part, h=h, on_step=report)
        state = State(solution.x[-1], grid[stop], {"h": solution.h})
    return state


def _renumbered(on_step: OnStep, first: int, steps: int) -> OnStep:
    """`on_step` of a part of a run, called with the index and number of steps of the whole."""
    return lambda info: on_step(info._replace(index=first + info.index, steps=steps))


def _toleranced(
    method: Method | Adaptive, rtol: float | Tensor | None, atol: float | Tensor | None
) -> Method | Adaptive:
    if isinstance(method, Adaptive):
        return tolerances.replace(method, rtol, atol)
    if rtol is not None or atol is not None:
        raise ValueError(f"{method.name} takes the steps of the times; rtol and atol are for adaptive methods")
    return method


def _check_method(method: object) -> None:
    if not isinstance(method, Method | Adaptive):
        raise ValueError(f"method {method!r} must be an ode.Method, such as ode.EULER, or of ode.named('euler')")


def _index(index: int, steps: int) -> int:
    if not -steps - 1 <= index <= steps:
        raise ValueError(f"save has the index {index}; the states of {steps} steps have indices 0 to {steps}")
    return index % (steps + 1)


def _both(first: OnStep | None, second: OnStep) -> OnStep:
    def call(info: StepInfo) -> None:
        if first is not None:
            first(info)
        second(info)

    return call
