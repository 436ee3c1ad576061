"""The composition: from prompts, and from pictures, to pictures. Each module is a few lines over the rooms below."""

from functional_sd3.pipeline.sampling import Conditions, evaluation_times, sample, sigmas, velocity
from functional_sd3.pipeline.text_to_image import (
    control_latents,
    decode,
    encode,
    encode_from,
    generate,
    generate_from,
    initial_noise,
    latent_size,
)

__all__ = [
    "Conditions",
    "control_latents",
    "decode",
    "encode",
    "encode_from",
    "evaluation_times",
    "generate",
    "generate_from",
    "initial_noise",
    "latent_size",
    "sample",
    "sigmas",
    "velocity",
]
