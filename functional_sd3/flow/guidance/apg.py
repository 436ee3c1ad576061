"""Adaptive projected guidance (APG): Sadat, Hilliges, Weber 2024, arXiv:2410.02416.

The difference of the velocities has momentum, a clipped norm, and a scaled-down component along the prompt's
prediction, the component that oversaturates images.
"""

import torch
from torch import Tensor

from functional_sd3.core.types import Tree
from functional_sd3.flow.guidance.combine import clip_norm, extrapolate, promoted, scale_parallel
from functional_sd3.flow.guidance.compose import (
    CONDITIONAL,
    NEGATIVE,
    POSITIVE,
    Guidance,
    Scale,
    Velocities,
    check_scale,
    is_one,
    value,
    windowed,
)
from functional_sd3.flow.guidance.recorded import recorded
from functional_sd3.flow.ode.method import no_carry
from functional_sd3.flow.path import broadcast, denoised


@recorded
def apg(
    scale: Scale,
    *,
    momentum: Scale = -0.5,
    eta: Scale = 0.0,
    longest: Scale | None = 15.0,
    from_positive: bool = False,
    of_data: bool = False,
) -> Guidance:
    """v_n + scale u, with u from d = v_p - v_n: d + momentum d_last, norm at most `longest`, parallel part times `eta`.

    This is diffusers' guider, whose defaults are no momentum and eta 1. The paper's algorithm differs in two ways:
    from_positive: v_p + (scale - 1) u instead, so that scale 1 is v_p whatever u is; of_data: all of it for the
    predictions x_0 = x - t v in place of velocities. longest: in the norm over a sample's elements, None for no limit.
    Python's momentum 0 carries nothing; with another the carry is one tensor like x, and `guidance.with_carry`
    carries it. At t = 0, where x_0 is x, of_data leaves momentum and limit aside.
    """
    check_scale(scale)
    check_scale(momentum, "momentum")
    check_scale(eta, "eta")
    if is_one(scale):
        return CONDITIONAL
    if isinstance(longest, (int, float)) and not longest > 0:
        raise ValueError(f"longest {longest} of adaptive projected guidance must be above 0, or None for no limit")
    has_carry = isinstance(momentum, Tensor) or momentum != 0

    def combine(velocities: Velocities, x: Tensor, t: Tensor, carry: Tree) -> tuple[Tensor, Tree]:
        negative, positive = promoted(velocities["negative"], velocities["positive"])
        start, end = (denoised(x, v, t) if of_data else v for v in (negative, positive))
        difference = end - start
        if has_carry:
            difference = carry = difference + broadcast(value(momentum, t), x) * carry
        update = difference if longest is None else clip_norm(difference, value(longest, t))
        update = scale_parallel(update, end, value(eta, t))
        if of_data:
            at_data = scale_parallel(positive - negative, end, value(eta, t))
            time = broadcast(t, x)
            update = torch.where(time > 0, -update / torch.where(time > 0, time, 1.0), at_data)
        base, factor = (positive, value(scale, t) - 1) if from_positive else (negative, value(scale, t))
        return base + broadcast(factor, base) * update, carry

    return Guidance({"negative": NEGATIVE, "positive": POSITIVE}, combine, zero_momentum if has_carry else no_carry)


@recorded
def mixed_apg(
    scale: Scale,
    projected_scale: Scale = 10.0,
    *,
    momentum: Scale = -0.5,
    eta: Scale = 0.0,
    longest: Scale | None = 10.0,
    first: int = 6,
) -> Guidance:
    """Classifier-free guidance in the first steps, then APG, whose momentum includes those steps.

    diffusers' AdaptiveProjectedMixGuidance, with these defaults; its start_step is `first` - 1.
    """
    check_scale(scale)
    projected = apg(projected_scale, momentum=momentum, eta=eta, longest=longest)
    if projected.init is no_carry or is_one(scale):
        raise ValueError("mixed_apg needs a momentum that is not 0 and scales that are not 1: use apg or cfg instead")

    def combine(velocities: Velocities, x: Tensor, t: Tensor, carry: Tree) -> tuple[Tensor, Tree]:
        negative, positive = promoted(velocities["negative"], velocities["positive"])
        carry = positive - negative + broadcast(value(momentum, t), x) * carry
        return extrapolate(negative, positive, value(scale, t)), carry

    return windowed(projected._replace(combine=combine), projected, lambda step, _: step < first)


def zero_momentum(x: Tensor, t: Tensor) -> Tensor:
    """Momentum before the first evaluation: zeros like x (batch, ...)."""
    return torch.zeros_like(x)
