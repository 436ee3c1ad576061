"""Guidances of the literature. v_p, v_n: the velocities of the prompt and of the negative prompt."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import Tensor

from functional_sd3.core.attention import blurred_attention
from functional_sd3.core.types import Tree
from functional_sd3.flow.guidance.combine import damped_scale, extrapolate, project_onto, rescale, tangential_component
from functional_sd3.flow.guidance.compose import (
    CONDITIONAL,
    NEGATIVE,
    POSITIVE,
    ZERO,
    Branch,
    Guidance,
    Scale,
    Velocities,
    check_scale,
    is_one,
    map_velocity,
    pairwise,
    plus,
    value,
    windowed,
)
from functional_sd3.flow.guidance.recorded import recorded
from functional_sd3.flow.guidance.windows import Window, check_fractions, fraction, strictly


@recorded
def cfg(scale: Scale) -> Guidance:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): v_n + scale (v_p - v_n).

    Python's scale 1 needs no v_n, here and in the others of one scale.
    """
    return _extrapolate_from(lambda negative, positive: negative, scale)


@recorded
def zero_star(scale: Scale) -> Guidance:
    """CFG-Zero* (Fan et al. 2025, arXiv:2503.18886): v_s + scale (v_p - v_s), v_s the projection of v_p onto v_n.

    The paper's zero-init, no velocity in the first steps, is `zero_init`; diffusers' guider does both.
    """
    return _extrapolate_from(project_onto, scale)


@recorded
def tangential(scale: Scale) -> Guidance:
    """Tangential guidance (Kwon et al. 2025, arXiv:2503.18137): v_s + scale (v_p - v_s), v_s v_n's shared component."""
    return _extrapolate_from(tangential_component, scale)


@recorded
def magnitude_aware(scale: Scale, rate: Scale = 8.0) -> Guidance:
    """MAMBO-G (arXiv:2508.03442): v_n + s (v_p - v_n), s = 1 + (scale - 1) exp(-rate |v_p - v_n| / |v_n|)."""
    check_scale(scale)
    check_scale(rate, "rate")
    if is_one(scale):
        return CONDITIONAL

    def combine(negative: Tensor, positive: Tensor, x: Tensor, t: Tensor) -> Tensor:
        damped = damped_scale(negative, positive, value(scale, t), value(rate, t))
        return extrapolate(negative, positive, damped)

    return pairwise(combine)


@recorded
def auto(scale: Scale, params: Tree, config: Any = None) -> Guidance:
    """Autoguidance (Karras et al. 2024, arXiv:2406.02507): v_w + scale (v_p - v_w), away from a weaker model.

    params, config: of the weaker transformer, with the same conditioning; config None where its sizes are the same.
    """
    check_scale(scale)
    if is_one(scale):
        return CONDITIONAL

    def change(v: Tensor, velocities: Velocities, t: Tensor) -> Tensor:
        return extrapolate(velocities["weak"], v, value(scale, t))

    return map_velocity(CONDITIONAL, {"weak": Branch(model=(params, config))}, change)


@recorded
def composed(guidance: Guidance, *prompts: tuple[Any, Scale]) -> Guidance:
    """Further prompts, each with a weight: v + sum_i w_i (v_i - v_n) (Liu et al. 2022, arXiv:2206.01714).

    prompts: (conditioning (batch or 1, ...), weight); a weight below 0 guides away from that prompt.
    """
    for conditioning, weight in prompts:
        number = 1 + sum(name.startswith("prompt ") for name in guidance.needs)
        guidance = plus(guidance, weight, {f"prompt {number}": Branch(conditioning)}, {"negative": NEGATIVE})
    return guidance


@recorded
def skip_layer(
    guidance: Guidance, layers: Collection[int], scale: Scale = 2.5, start: float = 0.01, stop: float = 0.2
) -> Guidance:
    """Skip-layer guidance: v + scale (v_p - v_s), v_s without some blocks, in steps with start < i / steps < stop.

    As the released code of SD3.5 has it and diffusers' pipeline, both bounds excluded. For SD3.5-medium: layers 7, 8
    and 9 and these defaults, over `cfg`. One more evaluation a step, inside the window.
    """
    worse = _with_blocks("skip_layers", layers)
    return _away_from(guidance, worse, scale, strictly(start, stop))


@recorded
def perturbed(
    guidance: Guidance, layers: Collection[int], scale: Scale = 3.0, start: float = 0.0, stop: float = 1.0
) -> Guidance:
    """Perturbed-attention guidance (Ahn et al. 2024, arXiv:2403.17377): v + scale (v_p - v_i).

    v_i has the identity for the image's attention over itself in the blocks `layers`. One more evaluation a step, in
    the part of the run from start to stop.
    """
    worse = _with_blocks("perturbed_layers", layers)
    return _away_from(guidance, worse, scale, _window(start, stop))


@recorded
def smoothed(
    guidance: Guidance,
    layers: Collection[int],
    scale: Scale = 3.0,
    sigma: float = float("inf"),
    start: float = 0.0,
    stop: float = 1.0,
) -> Guidance:
    """Smoothed energy guidance (Hong 2024, arXiv:2408.00760): v + scale (v_p - v_b).

    v_b has the image's queries blurred in the blocks `layers`, by a Gaussian of `sigma` patches, over which they are
    all the same at infinity. Cost and part of the run as `perturbed`.
    """
    if not sigma > 0:
        raise ValueError(f"sigma {sigma} of smoothed energy guidance must be above 0: the width of the blur in patches")
    worse = _with_blocks("perturbed_layers", layers, perturbation=partial(blurred_attention, sigma=sigma))
    return _away_from(guidance, worse, scale, _window(start, stop))


@recorded
def rescaled(guidance: Guidance, factor: Scale = 0.7) -> Guidance:
    """Rescaled guidance (Lin et al. 2023, arXiv:2305.08891): v with the standard deviation of v_p, mixed in by
    `factor`.

    factor in [0, 1]. As in diffusers the deviation is of velocities, over all of a sample, and always of v_p.
    """
    check_scale(factor, "factor of rescaled guidance")
    if isinstance(factor, (int, float)) and not 0 <= factor <= 1:
        raise ValueError(f"factor {factor} of rescaled guidance must be in [0, 1]")
    if guidance is ZERO:
        return ZERO

    def change(v: Tensor, velocities: Velocities, t: Tensor) -> Tensor:
        return rescale(v, velocities["positive"], value(factor, t))

    changed = map_velocity(guidance, {"positive": POSITIVE}, change)
    at = guidance.at
    return changed if at is None else changed._replace(at=lambda step, steps: rescaled(at(step, steps), factor))


@recorded
def interval(guidance: Guidance, start: float = 0.0, stop: float = 1.0) -> Guidance:
    """Guidance interval: guidance in a part of the run, v_p outside it, which halves the work there.

    Kynkaanniemi et al. 2024, arXiv:2404.07724. start, stop: fractions of the steps (`windows.fraction`);
    `step_fractions` gives them for an interval of t.
    """
    return windowed(guidance, CONDITIONAL, fraction(start, stop))


@recorded
def zero_init(guidance: Guidance, steps: int = 1) -> Guidance:
    """Zero-init of CFG-Zero* (Fan et al. 2025, arXiv:2503.18886): velocity zero in the first steps, not evaluated."""
    if steps < 0:
        raise ValueError(f"zero_init of {steps} steps must be of 0 or more")
    return windowed(ZERO, guidance, lambda step, _: step < steps)


def _extrapolate_from(start: Callable[[Tensor, Tensor], Tensor], scale: Scale) -> Guidance:
    """v_s + scale (v_p - v_s) with v_s = start(v_n, v_p)."""
    check_scale(scale)
    if is_one(scale):
        return CONDITIONAL
    return pairwise(lambda negative, positive, x, t: extrapolate(start(negative, positive), positive, value(scale, t)))


def _with_blocks(option: str, layers: Collection[int], **more: Any) -> dict[str, Branch]:
    """The velocity of the prompt under an option of the network that names blocks."""
    layers = tuple(sorted(set(layers)))
    if not layers:
        raise ValueError(f"guidance by {option} needs the index of one block at least")
    kind = "".join(f" {name}" for name in more)
    return {f"{option} {layers}{kind}": Branch(options=((option, layers), *more.items()))}


def _away_from(guidance: Guidance, worse: dict[str, Branch], scale: Scale, window: Window | None) -> Guidance:
    """v + scale (v_p - v_worse), in a window of the run if there is one."""
    guided = plus(guidance, scale, {"positive": POSITIVE}, worse)
    return guided if window is None else windowed(guided, guidance, window)


def _window(start: float, stop: float) -> Window | None:
    check_fractions(start, stop)
    return None if (start, stop) == (0, 1) else fraction(start, stop)
