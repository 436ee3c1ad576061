"""Stable Diffusion 3.5 as composable pure functions over explicit parameter trees.

    import functional_sd3 as sd3

    model = sd3.weights.load(sd3.weights.shipped.folder())
    images = sd3.pipeline.generate(
        model.params, model.config, model.tokenizers, "a large red circle on a white background", sd3.prng.key(0)
    )

Every component has a frozen `Config`, `spec(config)`, `init(key, config)` and a pure `apply(params, config, ...)`.
"""

from functional_sd3 import pipeline, weights
from functional_sd3.core import attention, layers, prng, spec, transform, tree
from functional_sd3.flow import guidance, ode, path, schedule
from functional_sd3.image import clip_pixels, pictures, pixels, taesd, vae
from functional_sd3.metrics import (
    clip_images,
    clip_score,
    cmmd,
    collect,
    density_coverage,
    fid,
    frechet,
    inception,
    inception_score,
    kid,
    precision_recall,
    preprocess,
    prompts,
    similarity,
)
from functional_sd3.text import bpe, clip, clip_dual, conditioning, inversion, t5, unigram
from functional_sd3.training import datasets, lora, optim, shapes, step
from functional_sd3.transformer import control, controlnet, ip_adapter, mmdit
from functional_sd3.weights import merge, quantize, shipped

__version__ = "0.1.0"

__all__ = [
    "attention",
    "bpe",
    "clip",
    "clip_dual",
    "clip_images",
    "clip_pixels",
    "clip_score",
    "cmmd",
    "collect",
    "conditioning",
    "control",
    "controlnet",
    "datasets",
    "density_coverage",
    "fid",
    "frechet",
    "guidance",
    "inversion",
    "ip_adapter",
    "inception",
    "inception_score",
    "kid",
    "layers",
    "lora",
    "merge",
    "mmdit",
    "ode",
    "optim",
    "path",
    "pictures",
    "pipeline",
    "pixels",
    "precision_recall",
    "preprocess",
    "prng",
    "prompts",
    "quantize",
    "schedule",
    "shapes",
    "shipped",
    "similarity",
    "spec",
    "step",
    "t5",
    "taesd",
    "transform",
    "tree",
    "unigram",
    "vae",
    "weights",
]
