"""Control images encoded to latents, with the value ranges that the released ControlNets were trained on."""

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core.checks import check_channels, check_floating
from functional_sd3.core.types import Key, Params
from functional_sd3.image import pixels, vae


def encode(
    params: Params,
    config: vae.Config,
    images: Tensor,
    *,
    shifted: bool = True,
    canny_range: bool = False,
    mask: Tensor | None = None,
    key: Key | None = None,
) -> Tensor:
    """images (batch, 3, height, width) in [0, 1] -> float32 latents (batch, channels [+ 1], height / 8, width / 8).

    shifted: normalised with the VAE's shift, as the transformer's latents are; diffusers leaves the shift out for
    ControlNets that were trained without the pooled embedding. canny_range: the VAE's input spans 0.5 to 128 instead of
    -1 to 1, as in Stability's reference for its canny file, and in diffusers. mask (batch or 1, 1, height, width):
    pixels above 0.5 are replaced by -1 before encoding, and an additional channel is 1 where the image is kept. key:
    samples the posterior (diffusers); its mean by default. Raises ValueError for other shapes.
    """
    check_floating("images", images, ", in [0, 1]: pixels.from_bytes(images) of bytes")
    check_channels("images", images, 3)
    inputs = images * 255.0 * 0.5 + 0.5 if canny_range else pixels.to_signed(images)
    if mask is not None:
        if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[-2:] != images.shape[-2:]:
            size = ", ".join(map(str, images.shape[-2:]))
            raise ValueError(f"mask of shape {list(mask.shape)} must be (batch or 1, 1, {size})")
        inputs = torch.where(mask > 0.5, -1.0, inputs)
    posterior = vae.encode(params, config, inputs.to(params["encoder"]["conv_in"]["weight"].dtype))
    latents = (posterior.mean if key is None else vae.sample(posterior, key)).float()
    latents = vae.normalize(config, latents) if shifted else latents * config.scaling
    if mask is None:
        return latents
    keep = 1 - F.interpolate(mask.to(latents), latents.shape[-2:])
    return torch.cat([latents, keep.expand(len(latents), -1, -1, -1)], dim=1)
