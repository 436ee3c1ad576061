"""The composition: from prompts, and from pictures, to pictures. Each module is a few lines over the rooms below."""

from functional_sd3.pipeline.editing import (
    difference,
    drawn_to,
    edit,
    edited,
    flow_edit,
    flow_edited,
    inverted,
    spanned,
)
from functional_sd3.pipeline.fields import Conditions, joined, rows, velocities, velocity
from functional_sd3.pipeline.image_to_image import Begun, begin, image_to_image
from functional_sd3.pipeline.inpainting import grown, holding, inpaint, latent_mask, outpaint, release_times, restored
from functional_sd3.pipeline.interpolation import between, interpolate, lerp, mix_conditions, slerp, variations
from functional_sd3.pipeline.latents import (
    control_latents,
    decode,
    encode_images,
    initial_noise,
    latent_size,
    step_keys,
)
from functional_sd3.pipeline.regions import Region, blended, regional, shares, tiled, tiles
from functional_sd3.pipeline.sampling import chosen_method, default_method, evaluation_times, sample, sigmas
from functional_sd3.pipeline.text_to_image import encode, encode_from, generate, generate_from
from functional_sd3.pipeline.trajectories import denoised, states, trajectory

__all__ = [
    "Begun",
    "Conditions",
    "Region",
    "begin",
    "between",
    "blended",
    "chosen_method",
    "control_latents",
    "decode",
    "default_method",
    "denoised",
    "difference",
    "drawn_to",
    "edit",
    "edited",
    "encode",
    "encode_from",
    "encode_images",
    "evaluation_times",
    "flow_edit",
    "flow_edited",
    "generate",
    "generate_from",
    "grown",
    "holding",
    "image_to_image",
    "initial_noise",
    "inpaint",
    "interpolate",
    "inverted",
    "joined",
    "latent_mask",
    "latent_size",
    "lerp",
    "mix_conditions",
    "outpaint",
    "regional",
    "release_times",
    "restored",
    "rows",
    "sample",
    "shares",
    "sigmas",
    "slerp",
    "spanned",
    "states",
    "step_keys",
    "tiled",
    "tiles",
    "trajectory",
    "variations",
    "velocities",
    "velocity",
]
