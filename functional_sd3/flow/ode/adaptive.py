"""Adaptive step sizes by error tolerance: every sample of a batch takes its own steps.

    solution = solve(DOPRI5, velocity, noise, [1.0, 0.0], rtol=1e-5, atol=1e-6)

A sample's steps depend on it alone, so that its result is the same in any batch; samples that have reached the end are
no longer changed. The solution at the times in between is dense output, without evaluations.

`solve` is a fold over `Run`, a tree of tensors: `start`, `step` until `finished`, `finish`. Between two steps a run can
be saved and resumed, with the same result to the bit. `step` is straight-line code that reads no
value on the host: it works under `torch.compile(fullgraph=True)` and `vmap`. `solve` does not: its number of
steps depends on values, which a compiled or vmapped loop cannot read. Put the samples in one batch instead.

Derivatives, in both modes, are those of the accepted steps with their lengths held fixed, in x, the times and all that
the velocity closes over. Reverse mode keeps every attempt in memory, the rejected ones too where another sample of the
batch accepted.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Velocity
from functional_sd3.flow.evaluation import evaluate
from functional_sd3.flow.ode import dense, step_size, tolerances
from functional_sd3.flow.ode.embedded import BOSH3, DOPRI5, TSIT5, Adaptive
from functional_sd3.flow.ode.method import State, StepInfo
from functional_sd3.flow.ode.runge_kutta import combine, stages
from functional_sd3.flow.path import broadcast, denoised
from functional_sd3.flow.times import Times, checked

METHODS = {method.name: method for method in (BOSH3, DOPRI5, TSIT5)}
"""The adaptive methods by name, for command lines."""


class Run(NamedTuple):
    """State of an adaptive run; fields are (batch,) in the dtype of x unless another shape is given."""

    x: Tensor
    """(batch, ...) at time t."""
    t: Tensor
    slope: Tensor
    """The velocity at (x, t), (batch, ...)."""
    h: Tensor
    """Length of the next attempt, positive."""
    error: Tensor
    """Error of the last accepted step, in units of the tolerance."""
    attempt_error: Tensor
    """Error of the last attempt: above 1 where it was rejected, not finite where the velocity is not."""
    times: Tensor
    """(n, batch): the start, the times of the solution in between, and the end."""
    states: Tensor
    """(n, batch, ...): the solution at those of the times that have been reached."""
    evaluations: Tensor
    """int64, as `accepted` and `rejected`."""
    accepted: Tensor
    rejected: Tensor


class Solution(NamedTuple):
    """Result of an adaptive run, with the counts of its steps and evaluations."""

    x: Tensor
    """(n, batch, ...): the solution at `times`; `x[-1]` is the end."""
    times: Tensor
    """(n, batch)"""
    evaluations: Tensor
    """int64 (batch,): evaluations of a sample until its end, not those of other samples after it."""
    accepted: Tensor
    """int64 (batch,): steps."""
    rejected: Tensor
    """int64 (batch,): attempts whose error was too large."""
    dense: list[dense.Piece]
    """Every step, for `dense.evaluate(solution.dense, t)` at any t; empty unless kept."""
    h: Tensor
    """(batch,): the length that the next step would have."""


class StepFailed(ArithmeticError):
    """An adaptive method could not complete a step: `sample`, its `t`, the step length `h` that failed, and the `run`
    with all its states, of which `state` is the last good one."""

    def __init__(self, message: str, sample: int, run: Run):
        super().__init__(message)
        self.sample, self.run = sample, run
        self.t, self.h, self.state = run.t[sample].item(), run.h[sample].item(), State(run.x, run.t, [])


def solve(
    method: Adaptive,
    velocity: Velocity,
    x: Tensor,
    times: Times,
    *,
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
    max_steps: int | None = None,
    h: float | Tensor | None = None,
    keep: bool = False,
    on_step: Callable[[StepInfo], Any] | None = None,
) -> Solution:
    """The solution from x at times[0] to times[-1], at each of `times`.

    velocity: called with t (batch,), each sample's own time. times: (n,) or (n, batch), monotone within [0, 1].
    rtol, atol, max_steps: instead of the method's; the error of the end is of the size of the tolerance, not below it.
    h: the length of the first step, by default from one evaluation more. keep: fill `Solution.dense`, which
    holds 4 or 5 times x for every step. on_step: called for each of times[1:] once all samples have passed it, with the
    straight line through it and the time before as the prediction of the data.

    Raises ValueError for times as `ode.integrate` does and for tolerances that x's dtype cannot meet; `StepFailed`,
    naming sample, t and h, when a step underflows, the velocity is not finite or max_steps attempts are not enough.
    """
    method = tolerances.replace(method, rtol, atol, max_steps)
    run, pieces, reported = start(method, velocity, x, times, h=h), [], 1
    while not finished(method, run):
        run, piece = _attempt(method, velocity, run, keep)
        pieces += [] if piece is None else [piece]
        if on_step is not None:
            reported = _report(on_step, run, reported)
    return finish(run, pieces)


def start(method: Adaptive, velocity: Velocity, x: Tensor, times: Times, *, h: float | Tensor | None = None) -> Run:
    """The run before its first step, after one evaluation of the velocity and a second when h is not given."""
    if x.ndim == 0:
        raise ValueError("x is a scalar; an adaptive method takes samples, (batch, ...)")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    tolerances.check(method, x)
    grid = checked(times, x)
    grid = grid if grid.ndim == 2 else grid[:, None].expand(-1, len(x))
    t, end = grid[0], grid[-1]
    slope = evaluate(velocity, x, t)
    finite = torch.isfinite(slope.detach()).reshape(len(x), -1).all(1)
    evaluations = torch.full_like(t, 1, dtype=torch.int64)
    if h is None:
        length = step_size.first(method, velocity, x, t, end, slope)
        evaluations = evaluations + 1
    else:
        length = torch.as_tensor(h, dtype=x.dtype, device=x.device).abs().expand_as(t).clone()
    none = torch.zeros_like(evaluations)
    return Run(
        x=x,
        t=t,
        slope=slope,
        h=torch.where(finite, length, 0.0),
        error=torch.full_like(t.detach(), 1e-4),
        attempt_error=torch.where(finite, 0.0, torch.nan).to(t.dtype),
        times=grid,
        states=x.expand(len(grid), *x.shape),
        evaluations=evaluations,
        accepted=none,
        rejected=none,
    )


def step(method: Adaptive, velocity: Velocity, run: Run) -> Run:
    """One attempt of a step for every sample before its end: accepted where the error is within the tolerance, to be
    repeated with a shorter step where it is not."""
    return _attempt(method, velocity, run, False)[0]


def finished(method: Adaptive, run: Run) -> bool:
    """True if all samples have reached the end; raises `StepFailed` when one cannot. No other function reads values."""
    unfinished, failing = run.t != run.times[-1], _failing(method, run)
    try:
        code = (unfinished.any() + 2 * failing.any()).item()
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise ValueError(
            "an adaptive method cannot run under vmap, which has one loop for all: put the samples in one batch, where "
            "each has its own steps, or use a method of fixed steps"
        ) from error
    if code >= 2:
        raise _failure(method, run, int(failing.to(torch.uint8).argmax()))
    return code == 0


def finish(run: Run, pieces: list[dense.Piece] | None = None) -> Solution:
    """The solution of a finished run."""
    is_end = broadcast(run.times == run.times[-1], run.states)
    states = torch.where(is_end, run.x, run.states)
    return Solution(states, run.times, run.evaluations, run.accepted, run.rejected, pieces or [], run.h)


def to_tensors(run: Run) -> dict[str, Tensor]:
    """A run as flat named tensors, for safetensors."""
    return tree.flatten_paths(run)


def from_tensors(tensors: dict[str, Tensor]) -> Run:
    """The inverse of `to_tensors`."""
    return Run(**tensors)


def _attempt(method: Adaptive, velocity: Velocity, run: Run, keep: bool) -> tuple[Run, dense.Piece | None]:
    x, t, end = run.x, run.t, run.times[-1]
    # A step may be 1 % longer to avoid a tiny last one, and ends at the end itself, not its rounding.
    is_last = 1.01 * run.h >= (end - t).detach().abs()
    t_next = torch.where(is_last, end, t + torch.copysign(run.h, (end - t).detach()))
    slopes = stages(method.tableau, velocity, x, t, t_next, run.slope)
    h = broadcast(t_next - t, x)
    x_next = x + h * combine(method.tableau.weights, slopes)
    error = step_size.norm(h * combine(method.errors, slopes), x, x_next, method)
    is_active = t != end
    accepted, rejected = is_active & (error <= 1), is_active & ~(error <= 1)
    length = (t_next - t).detach().abs() * step_size.factor(method, error, run.error, ~(run.attempt_error <= 1))
    # A step shortened by the end does not shorten the length of the next.
    length = torch.where(accepted & is_last, torch.maximum(length, run.h), length)
    is_accepted, piece, states = broadcast(accepted, x), None, run.states
    if keep or len(run.times) > 2:
        piece = dense.piece(method, x, slopes, t, torch.where(accepted, t_next, t))
        between = run.times[1:-1]
        reached = broadcast(dense.is_inside(piece, between), states)
        inner = torch.where(reached, dense.value(piece, between), states[1:-1])
        states = torch.cat([states[:1], inner, states[-1:]])
    after = Run(
        x=torch.where(is_accepted, x_next, x),
        t=torch.where(accepted, t_next, t),
        slope=torch.where(is_accepted, slopes[-1], run.slope),
        h=torch.where(is_active, length, run.h),
        error=torch.where(accepted, error, run.error),
        attempt_error=torch.where(is_active, error, run.attempt_error),
        times=run.times,
        states=states,
        evaluations=run.evaluations + is_active * (len(slopes) - 1),
        accepted=run.accepted + accepted,
        rejected=run.rejected + rejected,
    )
    return after, piece


def _failing(method: Adaptive, run: Run) -> Tensor:
    left = (run.times[-1] - run.t).detach().abs()
    lost = run.h < torch.minimum(step_size.smallest(run.x, run.t, run.times[-1]), left)
    return (left > 0) & (lost | (run.accepted + run.rejected >= method.max_steps))


def _failure(method: Adaptive, run: Run, sample: int) -> StepFailed:
    t, h, end = (float(value[sample]) for value in (run.t, run.h, run.times[-1]))
    place = f"sample {sample} stopped at t = {t:.9g} on its way to {end:.6g} after {int(run.accepted[sample])} steps: "
    if not math.isfinite(float(run.attempt_error[sample])):
        return StepFailed(
            f"{place}the velocity gives values that are not finite there (tried down to h = {h:.3g})", sample, run
        )
    tolerance = ", ".join(
        f"{name} = {float(value.expand(len(run.t))[sample] if isinstance(value, Tensor) else value):.3g}"
        for name, value in (("rtol", method.rtol), ("atol", method.atol))
    )
    if int(run.accepted[sample] + run.rejected[sample]) >= method.max_steps:
        reason = f"max_steps = {method.max_steps} attempts did not suffice at {tolerance} (the next has h = {h:.3g})"
    else:
        reason = f"even a step of h = {h:.3g} has an error beyond {tolerance}, which rounding may be too coarse for"
    return StepFailed(f"{place}{reason}", sample, run)


def _report(on_step: Callable[[StepInfo], Any], run: Run, reported: int) -> int:
    """Call `on_step` for the times that all samples have passed since; the number of times reported."""
    solution = finish(run)
    ahead = (run.times - run.t) * (run.times[-1] - run.times[0]) > 0
    passed = len(run.times) - int(ahead.any(1).sum())
    for index in range(reported, passed):
        x, t, length = solution.x[index], run.times[index], run.times[index] - run.times[index - 1]
        slope = (x - solution.x[index - 1]) / broadcast(torch.where(length == 0, 1.0, length), x)
        on_step(StepInfo(index - 1, len(run.times) - 1, State(x, t, []), denoised(x, slope, t)))
    return passed
