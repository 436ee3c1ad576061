"""Steps of a run under a cache (`flow.caches`): what of a velocity is cached, and what is computed at every step.

Cached is what networks compute: the guided velocity, or the velocities of the branches where a guidance carries a
state, which then follows every step. A mask, and all else that transforms the guided velocity, is exact at every step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from functional_sd3.core.types import Tree, Velocity
from functional_sd3.flow import guidance as guidances
from functional_sd3.flow import ode
from functional_sd3.flow.caches import Cache, FirstBlock, TeaCache, is_of_blocks, parse, write
from functional_sd3.flow.caching import CachedStep, with_cache
from functional_sd3.flow.guidance import Guidance
from functional_sd3.flow.ode.method import Method
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.dividing import mesh_of
from functional_sd3.transformer.block_cache import Evaluation

Transform = Callable[[Any], Any]


def chosen(cache: Cache | str | None) -> Cache | None:
    """The cache of words (`caches.parse`), or as it is."""
    return parse(cache) if isinstance(cache, str) else cache


def check(cache: Cache, config: Config, *, has_field: bool) -> None:
    """Raises ValueError for a cache of blocks where one evaluation of one process does not see them all."""
    if not is_of_blocks(cache):
        return
    if mesh_of(config) is not None:
        raise ValueError(
            f"cache {write(cache)} decides by the tokens of whole blocks, which a mesh divides over processes: "
            "choose extrapolate, hold or adaptive, or one process"
        )
    if has_field:
        raise ValueError(
            f"cache {write(cache)} is of one network's blocks, and regions, tiles and fields of one's own evaluate "
            "several: choose extrapolate, hold or adaptive"
        )


def cached_method(method: Method | ode.Adaptive, cache: Cache) -> Method:
    """The method for cached steps; those that draw noise extrapolate the prediction of the data."""
    return with_cache(method, cache, of_data=method.name in ode.STOCHASTIC)


def step_of(velocity: Velocity, transform: Transform | None) -> CachedStep:
    """A step whose guided velocity is cached."""
    return CachedStep(velocity) if transform is None else CachedStep(velocity, finish=transform)


def step_of_branches(
    fields: Any, guidance: Guidance, cache: Cache, samples: int, transform: Transform | None, *, has_carry: bool
) -> CachedStep:
    """A step of which the velocities of the branches are cached, or the blocks that compute them.

    fields: of `velocities`. transform: of the guided velocity, which has a state where `has_carry`.
    """
    make = partial(guidances.guided_with_carry if has_carry else guidances.guided, guidance)
    finish = make if transform is None else lambda evaluate: transform(make(evaluate))
    if isinstance(cache, FirstBlock | TeaCache):
        fields = _with_blocks(fields, cache, samples)
    return CachedStep(fields, finish=finish)


def _with_blocks(fields: Any, cache: FirstBlock | TeaCache, samples: int) -> Callable[..., tuple[Tree, Tree]]:
    """`fields` with the state of each network's evaluation as an argument and a result."""
    options: dict[str, Any] = {"after_first": isinstance(cache, FirstBlock), "samples": samples}
    options |= {} if isinstance(cache, FirstBlock) else {"polynomial": cache.polynomial}

    def evaluate(x: Tensor, t: Tensor, state: Tree, is_computed: bool) -> tuple[Tree, Tree]:
        evaluations: list[Evaluation] = []

        def around(index: int) -> Callable[[Callable], Callable]:
            before = state.get(f"network {index}", {})
            evaluations.append(Evaluation(before, cache.threshold, is_computed=is_computed, **options))
            return evaluations[-1].transform

        velocities = fields(x, t, around)
        states = {f"network {index}": each.state for index, each in enumerate(evaluations)}
        return velocities, {name: each for name, each in states.items() if each}

    return evaluate
