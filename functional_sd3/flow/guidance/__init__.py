"""Guidance as functions from velocities to a velocity, so that they compose.

    velocity = guided(rescaled(zero_star(5.0), 0.7), {"positive": prompt_field, "negative": negative_field})

Which velocities are needed and what is made of them is a value (`Guidance`), made by the functions named here after
their papers: `cfg`, `zero_star`, `tangential`, `magnitude_aware`, `apg`, `auto` begin one, and `skip_layer`,
`perturbed`, `smoothed`, `composed`, `rescaled`, `interval`, `zero_init` make another of one. `pipeline.sample` takes
it as `guidance=` and evaluates only what a step needs.

Scales are Python numbers, or tensors of shape () or (batch,): differentiable, one for each sample if need be; or
functions of t (`per_step`). Velocities are combined in float32, whatever the network's dtype.
"""

from functional_sd3.flow.guidance.apg import apg, mixed_apg
from functional_sd3.flow.guidance.combine import extrapolate
from functional_sd3.flow.guidance.compose import (
    CONDITIONAL,
    NEGATIVE,
    POSITIVE,
    ZERO,
    Branch,
    Call,
    Guidance,
    Scale,
    Velocities,
    at,
    check_scale,
    pairwise,
    plus,
    same_model,
    segments,
    windowed,
)
from functional_sd3.flow.guidance.literature import (
    auto,
    cfg,
    composed,
    interval,
    magnitude_aware,
    perturbed,
    rescaled,
    skip_layer,
    smoothed,
    tangential,
    zero_init,
    zero_star,
)
from functional_sd3.flow.guidance.velocities import (
    StatefulVelocity,
    VelocityFields,
    batch_fields,
    batched,
    classifier_free,
    guided,
    guided_with_carry,
    with_carry,
)
from functional_sd3.flow.guidance.windows import fraction, per_step, step_fractions, strictly

__all__ = [
    "Branch",
    "CONDITIONAL",
    "Guidance",
    "Call",
    "NEGATIVE",
    "POSITIVE",
    "StatefulVelocity",
    "ZERO",
    "Scale",
    "Velocities",
    "VelocityFields",
    "apg",
    "at",
    "auto",
    "batch_fields",
    "batched",
    "cfg",
    "check_scale",
    "classifier_free",
    "composed",
    "extrapolate",
    "fraction",
    "guided",
    "interval",
    "magnitude_aware",
    "mixed_apg",
    "pairwise",
    "per_step",
    "perturbed",
    "plus",
    "guided_with_carry",
    "rescaled",
    "same_model",
    "segments",
    "skip_layer",
    "smoothed",
    "step_fractions",
    "strictly",
    "tangential",
    "windowed",
    "with_carry",
    "zero_init",
    "zero_star",
]
