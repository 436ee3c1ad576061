"""A run of a method over a grid of times: a fold of its step, whole (`integrate`) or in parts (`run`)."""

from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Velocity
from functional_sd3.flow.ode import adaptive, tolerances
from functional_sd3.flow.ode.embedded import Adaptive
from functional_sd3.flow.ode.method import Method, State, StepInfo
from functional_sd3.flow.path import denoised
from functional_sd3.flow.times import Times, checked

Save = Literal["all"] | Collection[int] | Callable[[StepInfo], Any]


class NonFiniteError(ArithmeticError):
    """The state is not finite after step `index` (0 is the first), from time `t`; `state` is the last good one."""

    def __init__(self, index: int, steps: int, state: State):
        times = ", ".join(f"{time:.6g}" for time in state.t.detach().flatten().tolist())
        super().__init__(f"step {index + 1} of {steps}, from t = {times}, gave values that are not finite")
        self.index, self.t, self.state = index, state.t, state


def integrate(
    method: Method | Adaptive,
    velocity: Velocity,
    x: Tensor,
    times: Times,
    *,
    save: Save | None = None,
    on_step: Callable[[StepInfo], Any] | None = None,
    check: bool = False,
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
) -> Any:
    """x at times[-1], from x at times[0], in len(times) - 1 steps, or in those that an adaptive method chooses.

    velocity: `(x (batch, ...) in the dtype of the state, t scalar or (batch,)) -> dx/dt`.
    times: (n + 1,), descending to generate, ascending to invert, in [0, 1]; or (n + 1, batch), a grid for each sample,
    where shorter grids are padded by repeating their last time (`schedule.together`) and a `last` step is that of the
    longest. An adaptive method chooses its own steps between the ends; the times in between are only where the
    solution is returned.
    save: None returns the last x (batch, ...); "all" the n + 1 states at `times`, (n + 1, batch, ...); indices into
    `times` those states only, stacked in the order given; a function the list of what it returned for each `StepInfo`.
    on_step: called with the `StepInfo` after each step; what it returns is ignored.
    check: raise `NonFiniteError` after the first step whose state is not finite (which waits for the device each step).
    rtol, atol: of an adaptive method, which raises `adaptive.StepFailed` when it cannot go on; default 1e-5 and 1e-6.

    Raises ValueError for grids of the wrong shape and, when the values are at hand (in CPU memory, not being traced),
    for grids that are not monotone or leave [0, 1].
    """
    grid = checked(times, x)
    steps = len(grid) - 1
    method = _toleranced(method, rtol, atol)
    state = start(method, x, grid[0])
    if save is None:
        return run(method, velocity, state, grid, on_step=on_step, check=check).x
    if callable(save):
        answers: list[Any] = []
        on_step = _both(on_step, lambda info: answers.append(save(info)))
        run(method, velocity, state, grid, on_step=on_step, check=check)
        return answers
    wanted = range(steps + 1) if save == "all" else [_index(index, steps) for index in save]
    kept = {0: state.x}

    def keep(info: StepInfo) -> None:
        if info.index + 1 in wanted:
            kept[info.index + 1] = info.x

    run(method, velocity, state, grid, on_step=_both(on_step, keep), check=check)
    return torch.stack([kept[index] for index in wanted])


def start(method: Method | Adaptive, x: Tensor, t: Tensor | float) -> State:
    """The state of a run before its first step: x in float32 (float64 if it is), t in the same dtype."""
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
    velocity: Velocity,
    state: State,
    times: Times,
    *,
    on_step: Callable[[StepInfo], Any] | None = None,
    ends: bool = True,
    check: bool = False,
) -> State:
    """From a state at times[0] to the state at times[-1]. Parts of a grid run one after the other give the whole run.

    So a run can pause after any step k (`times[: k + 1]`), be saved (`to_tensors`) and resume from there (`times[k:]`),
    with the same result to the bit. `ends`: True if the last of `times` is the end of the whole grid,
    where a method with a `last` step takes it; False for earlier parts.

    An adaptive method ends each part exactly at its last time and carries only its next step length: the parts equal
    the whole within the tolerance. To pause one anywhere, to the bit, use `adaptive.step`.
    """
    grid = checked(times, state.x)
    if isinstance(method, Adaptive):
        grid = grid if on_step is not None else grid[[0, -1]]
        h = state.carry["h"] if state.carry else None
        solution = adaptive.solve(method, velocity, state.x, grid, h=h, on_step=on_step)
        return State(solution.x[-1], grid[-1], {"h": solution.h})
    steps = len(grid) - 1
    for index, t_next in enumerate(grid[1:].unbind(0)):
        stepper = method.last if method.last and ends and index == steps - 1 else method
        x, carry, slope = stepper.step(velocity, state.x, state.t, t_next, state.carry)
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
    if isinstance(method, Adaptive):
        raise ValueError(f"{method.name} has no fixed number of evaluations; adaptive.solve counts them")
    calls = 0

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x

    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float32, device="cpu")
    integrate(method, counted, grid.new_zeros(1), grid)
    return calls


def _toleranced(
    method: Method | Adaptive, rtol: float | Tensor | None, atol: float | Tensor | None
) -> Method | Adaptive:
    if isinstance(method, Adaptive):
        return tolerances.replace(method, rtol, atol)
    if rtol is not None or atol is not None:
        raise ValueError(f"{method.name} takes the steps of the times; rtol and atol are for adaptive methods")
    return method


def _index(index: int, steps: int) -> int:
    if not -steps - 1 <= index <= steps:
        raise ValueError(f"save has the index {index}; the states of {steps} steps have indices 0 to {steps}")
    return index % (steps + 1)


def _both(first: Callable[[StepInfo], Any] | None, second: Callable[[StepInfo], Any]) -> Callable[[StepInfo], None]:
    def call(info: StepInfo) -> None:
        if first is not None:
            first(info)
        second(info)

    return call
