"""From prompts and images to images: a `Request` is prepared (encoded) and drawn (integrated and decoded).

The functions that draw (`generate`, `image_to_image`, ...) each make a request of their arguments.
"""

from functional_sd3.core.blend import slerp
from functional_sd3.pipeline.adapters import Adapted, adapted, with_loras
from functional_sd3.pipeline.blending import Region, blend_fields, shares, tiles
from functional_sd3.pipeline.components import Components
from functional_sd3.pipeline.dividing import mesh_of, with_mesh
from functional_sd3.pipeline.draw import decode_latents, draw, initial_state, sample_latents
from functional_sd3.pipeline.edit_images import edit, flow_edit
from functional_sd3.pipeline.edits import (
    edit_field,
    edit_latents,
    flow_edit_latents,
    invert_latents,
    pull_to,
    step_window_times,
)
from functional_sd3.pipeline.encoding import encode, encode_from
from functional_sd3.pipeline.fields import Conditions, slice_batch, velocities, velocity
from functional_sd3.pipeline.from_images import image_to_image, inpaint, outpaint
from functional_sd3.pipeline.interpolation import interpolate, variations
from functional_sd3.pipeline.latents import (
    control_latents,
    decode,
    encode_images,
    initial_noise,
    latent_size,
    step_keys,
)
from functional_sd3.pipeline.masks import extend_canvas, keep_masked, latent_mask, restore_kept, unmask_times
from functional_sd3.pipeline.mixing import between, lerp, mix_conditions
from functional_sd3.pipeline.prepare import Prepared, prepare, slice_samples, split_batches
from functional_sd3.pipeline.preview import preview
from functional_sd3.pipeline.record import describe, read_description
from functional_sd3.pipeline.request import (
    AppliedLora,
    FlowEdit,
    Frames,
    InversionEdit,
    Request,
    SamplingOptions,
    StartImages,
    TextOptions,
    Tiling,
    Variation,
    denoised,
    states,
)
from functional_sd3.pipeline.sampling import (
    NoisedStart,
    add_noise,
    chosen_method,
    default_method,
    sample,
    sigmas,
)
from functional_sd3.pipeline.swapping import swap_blocks
from functional_sd3.pipeline.text_to_image import generate, generate_from, regional, tiled
from functional_sd3.pipeline.trajectories import trajectory

__all__ = [
    "Adapted",
    "AppliedLora",
    "Components",
    "Conditions",
    "FlowEdit",
    "Frames",
    "InversionEdit",
    "NoisedStart",
    "Prepared",
    "Region",
    "Request",
    "SamplingOptions",
    "StartImages",
    "TextOptions",
    "Tiling",
    "Variation",
    "adapted",
    "add_noise",
    "between",
    "blend_fields",
    "chosen_method",
    "control_latents",
    "decode",
    "decode_latents",
    "default_method",
    "denoised",
    "describe",
    "draw",
    "edit",
    "edit_field",
    "edit_latents",
    "encode",
    "encode_from",
    "encode_images",
    "extend_canvas",
    "flow_edit",
    "flow_edit_latents",
    "generate",
    "generate_from",
    "image_to_image",
    "initial_noise",
    "initial_state",
    "inpaint",
    "interpolate",
    "invert_latents",
    "keep_masked",
    "latent_mask",
    "latent_size",
    "lerp",
    "mesh_of",
    "mix_conditions",
    "outpaint",
    "prepare",
    "preview",
    "pull_to",
    "read_description",
    "regional",
    "restore_kept",
    "sample",
    "sample_latents",
    "shares",
    "sigmas",
    "slerp",
    "slice_batch",
    "slice_samples",
    "split_batches",
    "states",
    "step_keys",
    "step_window_times",
    "swap_blocks",
    "tiled",
    "tiles",
    "trajectory",
    "unmask_times",
    "variations",
    "velocities",
    "velocity",
    "with_loras",
    "with_mesh",
]
