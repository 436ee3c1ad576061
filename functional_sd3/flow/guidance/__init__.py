"""Guidance as functions from velocities to a velocity, so that they compose.

    velocity = guided(rescaled(zero_star(5.0), 0.7), {"positive": told, "negative": told_to_keep_away_from})

Which velocities are needed and what is made of them is a value (`Guidance`), made by the functions named here after
their papers: `cfg`, `zero_star`, `tangential`, `magnitude_aware`, `apg`, `auto` begin one, and `skip_layer`,
`perturbed`, `smoothed`, `composed`, `rescaled`, `interval`, `zero_init` make another of one. `pipeline.sample` takes
it as `guidance=` and evaluates only what a step needs.

Scales are Python numbers, or tensors of shape () or (batch,): differentiable, one for each sample if need be; or
functions of t (`per_step`). What is combined is combined in float32, whatever dtype the network answers in.
"""

from functional_sd3.flow.guidance.apg import apg, mixed_apg
from functional_sd3.flow.guidance.combine import extrapolate
from functional_sd3.flow.guidance.compose import (
    CONDITIONAL,
    NEGATIVE,
    POSITIVE,
    STILL,
    Answers,
    Branch,
    Guidance,
    Scale,
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
    Remembering,
    Velocities,
    batched,
    classifier_free,
    guided,
    remembering,
    together,
    with_memory,
)
from functional_sd3.flow.guidance.windows import fraction, per_step, step_fractions, strictly

__all__ = [
    "Answers",
    "Branch",
    "CONDITIONAL",
    "Guidance",
    "NEGATIVE",
    "POSITIVE",
    "Remembering",
    "STILL",
    "Scale",
    "Velocities",
    "apg",
    "at",
    "auto",
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
    "remembering",
    "rescaled",
    "same_model",
    "segments",
    "skip_layer",
    "smoothed",
    "step_fractions",
    "strictly",
    "tangential",
    "together",
    "windowed",
    "with_memory",
    "zero_init",
    "zero_star",
]
