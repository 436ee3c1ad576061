"""Approximate images during a run: the latents of one step, decoded."""

import torch
from torch import Tensor

from functional_sd3.image import pixels, taesd
from functional_sd3.layouts.components import Config, require
from functional_sd3.pipeline.components import Components, fetch
from functional_sd3.pipeline.latents import decode


def preview(components: Components, config: Config, latents: Tensor, *, tile: int | None = None) -> Tensor:
    """Images (batch, 3, height, width) in [0, 1], float32, decoded by TAESD, or by the VAE of a model that has none.

    latents: (batch, channels, height / 8, width / 8), normalised, such as `StepInfo.denoised`, the prediction
    x_0 = x - t v that a step starts from:

        on_step=lambda info: show(preview(params, config, info.denoised))

    components: name -> parameters; config: its `taesd` is not None where they hold a "taesd". tile: as in `decode`, of
    the VAE alone: TAESD's activations take a fraction of its memory. Raises ValueError for latents of another number of
    channels.
    """
    if config.taesd is None:
        return decode({"vae": fetch(components, "vae")}, config, latents, tile=tile)
    params, config_of_taesd = fetch(components, "taesd"), require(config, "taesd")
    dtype: torch.dtype = params["decoder"]["conv_in"]["weight"].dtype
    return pixels.from_signed(taesd.decode(params, config_of_taesd, latents.to(dtype)).float())
