"""Velocities held, extrapolated or reused between the steps that compute them.

    method = caching.with_cache(ode.EULER, caches.Extrapolate(every=2))
    steps = caching.stepwise(velocity, caches.Extrapolate(every=2), 28)
    x = ode.integrate(method, steps, noise, schedule.sigmas(28))

The state is explicit: `with_cache` makes a method whose carry has it, so a run with a cache pauses, is saved and
resumes to the bit like any other. A cached step is a quadrature: all evaluations of the method in it see the polynomial
through the velocities at the starts of the last computed steps, whatever x.

`Extrapolate` computes a fixed pattern of steps: such a run can be vmapped, compiled whole, captured in a CUDA graph and
differentiated. The other caches decide by values, sample by sample, so that no sample depends on its batch: an
evaluation is saved where all samples of the batch can do without it. Where values cannot be read (under vmap and
compile, in a CUDA graph) every step is computed and `torch.where` chooses: the result is the same, and nothing is
saved.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import decisions, tree
from functional_sd3.core.types import Tree
from functional_sd3.flow.caches import Cache, Extrapolate, Tolerance, computed_steps, is_of_blocks
from functional_sd3.flow.ode.embedded import Adaptive
from functional_sd3.flow.ode.method import Advance, Method
from functional_sd3.flow.path import broadcast, denoised
from functional_sd3.flow.per_sample import dot
from functional_sd3.flow.stepwise import RunVelocity, Stepwise, at_step


class CachedStep(NamedTuple):
    """The velocity of one step of a run under a cache, what `with_cache` steps along."""

    evaluate: Callable[..., Any]
    """`evaluate(x, t)` -> what is cached: a velocity (batch, ...), or a dict of them. Of a cache of blocks
    `evaluate(x, t, state, is_computed)` -> (that, state), where {} is the state before the first."""
    is_computed: bool = True
    """True if the step is computed whatever its values."""
    is_start: bool = False
    """True if the velocity is another function than in the step before, so that what was cached is forgotten."""
    finish: Callable[[Callable[[Tensor, Tensor], Any]], Any] = lambda evaluate: evaluate
    """`finish(evaluate)` -> the velocity that the method follows, of what is cached: guidance, a mask."""


class Point(NamedTuple):
    """A computed velocity and its time, as it is kept in a carry: {"value", "t"}."""

    value: Tree
    """(batch, ...), or a dict of such."""
    t: Tensor
    """() or (batch,)"""


def stepwise(velocity: RunVelocity, cache: Cache, steps: int) -> Stepwise[Any]:
    """The velocity of a run of `steps` steps for `with_cache(method, cache)`, one field throughout or `Stepwise`.

    Steps with neighbouring velocities that are not the same object count as one whose velocity changes. A run that
    resumes takes `.after(k)` of it.
    """
    fields = [at_step(velocity, step) for step in range(steps)]
    starts = [step for step in range(steps) if not step or fields[step] is not fields[step - 1]]
    return cached_steps(cache, [CachedStep(field) for field in fields], starts)


def cached_steps(cache: Cache, steps: Sequence[CachedStep], starts: Sequence[int]) -> Stepwise[Any]:
    """The steps of a run with the pattern of a cache; starts: those at which the velocity becomes another function."""
    computed = computed_steps(cache, len(steps), starts)
    planned = [step._replace(is_computed=computed[index], is_start=index in starts) for index, step in enumerate(steps)]
    return Stepwise(planned.__getitem__)


def with_cache(method: Method | Adaptive, cache: Cache, *, of_data: bool = False) -> Method:
    """The method for a velocity of `CachedStep`s, for `ode.integrate` and `ode.run`; its carry is {"method", "cache"}.

    of_data: extrapolate the prediction of the data, x - t v, instead of the velocity: for methods that draw noise,
    whose x, and with it the velocity, changes by what no earlier velocity predicts.
    Raises ValueError for an adaptive method, which would take its steps by the errors of velocities that were not
    computed, and for one of mean velocities.
    """
    if isinstance(method, Adaptive):
        raise ValueError(
            f"method {method.name} takes its steps by the errors of velocities, which a cache does not compute: choose "
            "a method of fixed steps, or leave the cache out"
        )
    if method.mean:
        raise ValueError(
            f"method {method.name} takes few steps of a mean velocity, each over an interval of its own: there is "
            "nothing between them that a cache could extrapolate; leave the cache out"
        )
    form = DATA if of_data else VELOCITY
    # Each takes the cache of its own kind, which the type of a choice among them cannot express.
    run_step: Callable[..., _Running] = _of_pattern if isinstance(cache, Extrapolate) else _of_tolerance
    run_step = _of_blocks if is_of_blocks(cache) else run_step

    # velocity is a CachedStep, which the type of `Method.step` cannot express.
    def step(velocity: Any, x: Tensor, t: Tensor, t_next: Tensor, carry: Tree) -> Advance:
        state = {} if velocity.is_start else carry.get("cache", {})
        evaluate, next_state = run_step(cache, form, velocity, state, t, len(x))
        advance = method.step(velocity.finish(evaluate), x, t, t_next, carry.get("method", []))
        return advance._replace(carry={"method": advance.carry, "cache": next_state()})

    last = None if method.last is None else with_cache(method.last, cache, of_data=of_data)
    # The transition would be that of a velocity without a state.
    return method._replace(
        init=lambda x, t: {"method": method.init(x, t), "cache": {}}, step=step, last=last, transition=None
    )


def extrapolate(points: Sequence[Point], t: Tensor) -> Tree:
    """The polynomial through the points at time t, in float32 or wider; one point is held."""
    weights = [_lagrange(points, index, t) for index in range(len(points))]

    def combine(*values: Tensor) -> Tensor:
        wide = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in values]
        # Weights that add up to 1: the first value and differences to it, which are small.
        changes = [broadcast(weight, wide[0]) * (value - wide[0]) for weight, value in zip(weights, wide, strict=True)]
        return sum(changes[1:], wide[0])

    return tree.map(combine, *(point.value for point in points))


def _lagrange(points: Sequence[Point], index: int, t: Tensor) -> Tensor:
    weight = torch.ones_like(t)
    for other, point in enumerate(points):
        if other != index:
            distance = points[index].t - point.t
            # Equal times come from the padding at the end of a shorter grid in a batch, where a step has no length.
            weight = weight * (t - point.t) / torch.where(distance == 0, 1.0, distance)
    return weight


class Form(NamedTuple):
    """Transform of a velocity before it is stored for extrapolation, and its inverse."""

    store: Callable[[Tensor, Tensor, Tensor], Tensor]
    """`store(v, x, t)`"""
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor]
    """`velocity(stored, x, t)`"""


VELOCITY = Form(lambda v, x, t: v, lambda stored, x, t: stored)
DATA = Form(
    lambda v, x, t: denoised(x, v, t),
    # At t = 0 a prediction is x, whatever the velocity.
    lambda stored, x, t: (x - stored) / broadcast(torch.where(t == 0, 1.0, t), x),
)

_Running = tuple[Callable[[Tensor, Tensor], Any], Callable[[], Tree]]
"""The velocity that the method evaluates in a step, and a function that gives the state after it."""


def _of_pattern(cache: Extrapolate, form: Form, step: CachedStep, state: Tree, t: Tensor, batch: int) -> _Running:
    points, kept = _points(state), cache.order + 1
    if not step.is_computed:
        return _predicted(points, form, state.get("share")), lambda: state
    evaluate, first = _recorded(step.evaluate, form)

    def next_state() -> Tree:
        after: dict[str, Any] = {"points": _stored([*first, *points][:kept])}
        if cache.fitted and len(points) == kept:
            after["share"] = _best_share(points, first[0], batch)
        return after

    return evaluate, next_state


def _of_tolerance(cache: Tolerance, form: Form, step: CachedStep, state: Tree, t: Tensor, batch: int) -> _Running:
    points, kept = _points(state), cache.order + 1
    skip, decision = None, decisions.NONE
    if not step.is_computed:
        reach = ((t - points[0].t).abs() / state["gap"]) ** kept
        skip = (state["error"] * reach < cache.tolerance) & (state["row"] < cache.longest)
        decision = decisions.read(skip)
    predicted = _predicted(points, form, None)
    if decision.all:
        return predicted, lambda: {**state, "row": state["row"] + 1}
    evaluate, first = _recorded(step.evaluate, form)

    def mixed(x: Tensor, t: Tensor) -> Tree:
        values = evaluate(x, t)
        return _where(skip, predicted(x, t), values) if decision.any else values

    def next_state() -> Tree:
        point = first[0]._replace(t=first[0].t.expand(batch))
        after: dict[str, Any] = {"points": _stored([point, *points][:kept])}
        if len(points) == kept:
            gap = (point.t - points[0].t).abs().detach()
            error = _relative_difference(extrapolate(points, point.t), point)
            after |= {"error": error, "gap": torch.where(gap == 0, 1.0, gap), "row": torch.zeros_like(gap)}
        return _where(skip, {**state, "row": state["row"] + 1}, after) if decision.any else after

    return mixed, next_state


def _of_blocks(cache: Cache, form: Form, step: CachedStep, state: Tree, t: Tensor, batch: int) -> _Running:
    def evaluate(x: Tensor, t: Tensor) -> Tree:
        nonlocal state
        values, state = step.evaluate(x, t, state, step.is_computed)
        return values

    return evaluate, lambda: state


def _predicted(points: Sequence[Point], form: Form, share: Tensor | None) -> Callable[[Tensor, Tensor], Tree]:
    """The velocity of the polynomial through the points; share (batch,): of its difference to the last one."""

    def predicted(x: Tensor, t: Tensor) -> Tree:
        stored = extrapolate(points, t)
        if share is not None:
            stored = tree.map(lambda far, last: last + broadcast(share, far) * (far - last), stored, points[0].value)
        return tree.map(lambda each: form.velocity(each, x, t), stored)

    return predicted


def _best_share(points: Sequence[Point], point: Point, batch: int) -> Tensor:
    """The share a in [0, 1] of the extrapolation, last + a (far - last), that is nearest to the point: (batch,)."""
    along = squares = point.t.new_zeros(batch)
    far = extrapolate(points, point.t)
    for ahead, last, value in zip(*map(tree.leaves, (far, points[0].value, point.value)), strict=True):
        difference = ahead - last
        along, squares = along + dot(value - last, difference), squares + dot(difference, difference)
    return (along / squares.clamp(min=1e-20)).clamp(0, 1).to(point.t.dtype)


def _recorded(evaluate: Callable[[Tensor, Tensor], Tree], form: Form) -> tuple[Callable, list[Point]]:
    """The function, and a list that has the stored form and the time of its first call afterwards."""
    first: list[Point] = []

    def recorded(x: Tensor, t: Tensor) -> Tree:
        values = evaluate(x, t)
        if not first:
            first.append(Point(tree.map(lambda v: form.store(v, x, t), values), t))
        return values

    return recorded, first


def _points(state: Tree) -> list[Point]:
    # A step without networks (`guidance.zero_init`) caches {}, which leaves no tensor in a file.
    return [Point(point.get("value", {}), point["t"]) for point in state.get("points", [])]


def _stored(points: Sequence[Point]) -> list[Tree]:
    return [point._asdict() for point in points]


def _where(condition: Tensor | None, chosen: Tree, other: Tree) -> Tree:
    assert condition is not None
    return tree.map(lambda one, two: torch.where(broadcast(condition, two), one, two), chosen, other)


def _relative_difference(predicted: Tree, point: Point) -> Tensor:
    """|predicted - value| / |value| of each sample, (batch,) in the dtype of its time; no derivative."""
    difference = squares = torch.zeros_like(point.t)
    for one, two in zip(tree.leaves(predicted), tree.leaves(point.value), strict=True):
        one, two = one.detach(), two.detach().to(one.dtype)
        difference, squares = difference + dot(one - two, one - two), squares + dot(two, two)
    return (difference / squares.clamp(min=1e-20)).sqrt().to(point.t.dtype)
