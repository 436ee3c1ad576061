"""Images <-> normalised latents, and the noise that a run starts from."""

from operator import index
from typing import SupportsIndex

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key, Params
from functional_sd3.image import control as control_image
from functional_sd3.image import pixels, vae
from functional_sd3.layouts.components import Config, require
from functional_sd3.transformer import controlnet


def initial_noise(
    key: Key,
    config: Config,
    count: int,
    height: int | None = None,
    width: int | None = None,
    *,
    device: torch.device | str = "cpu",
    bounded: bool = True,
) -> Tensor:
    """Latents to start from, float32 (count, channels, height / 8, width / 8); every sample's from its own key.

    key: (2,), from which sample i takes `fold_in(key, i)`, or (count, 2), a key for each. `bounded` as in
    `latent_size`.
    """
    height, width = latent_size(config, height, width, bounded=bounded)
    return prng.normal(sample_keys(key, count), (require(config, "transformer").in_channels, height, width)).to(device)


def sample_keys(key: Key, count: int) -> Key:
    """(count, 2): the keys given, or those that one key folds into. Raises ValueError for another number of them."""
    return prng.sample_keys(key, count, "prompt")


def step_keys(key: Key, count: int) -> Key:
    """(count, 2): the keys of the noise that a method draws at its steps, from those that `initial_noise` takes."""
    # The counters of the starting noise never reach so far.
    return prng.fold_in(sample_keys(key, count), 2**31)


def encode_images(params: Params, config: Config, images: Tensor, *, key: Key | None = None) -> Tensor:
    """Images -> normalised latents, float32: images (batch, 3, height, width) in [0, 1].

    key: draws from the VAE's posterior, sample by sample as `initial_noise`; by default its mean is taken. Raises
    ValueError for other shapes, and sides that are no multiples of the VAE's factor.
    """
    dtype, sizes = params["vae"]["encoder"]["conv_in"]["weight"].dtype, require(config, "vae")
    posterior = vae.encode(params["vae"], sizes, pixels.to_signed(images).to(dtype))
    if key is None:
        latents = posterior.mean
    else:
        noise = prng.normal(sample_keys(key, len(images)), posterior.mean.shape[1:]).to(posterior.mean)
        latents = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise
    return vae.normalize(sizes, latents.float())


def decode(params: Params, config: Config, latents: Tensor, *, tile: int | None = None) -> Tensor:
    """Normalised latents -> images (batch, 3, height, width) in [0, 1], float32.

    tile: the side in latents of the overlapping tiles to decode in, for large images; by default all at once.
    """
    dtype, sizes = params["vae"]["decoder"]["conv_in"]["weight"].dtype, require(config, "vae")
    latents = vae.denormalize(sizes, latents).to(dtype)
    if tile is None:
        images = vae.decode(params["vae"], sizes, latents)
    else:
        images = vae.decode_tiled(params["vae"], sizes, latents, tile=tile, overlap=tile // 4)
    return pixels.from_signed(images.float())


def control_latents(
    params: Params,
    config: Config,
    images: Tensor,
    net: controlnet.Config,
    *,
    mask: Tensor | None = None,
    key: Key | None = None,
) -> Tensor:
    """Images as a ControlNet reads them: (batch, 3, height, width) in [0, 1] -> `Control.image_latents`.

    mask (batch or 1, 1, height, width): for a ControlNet with a channel more, 1 where the image is to be painted
    anew. key: draws from the VAE's posterior, as diffusers does; by default its mean is taken. Raises ValueError when
    a mask is missing or not wanted.
    """
    if (mask is None) != (net.extra_channels == 0):
        wanted = "wants a mask" if mask is None else "wants none"
        raise ValueError(f"this ControlNet reads {net.extra_channels} channels beside the latents: it {wanted}")
    return control_image.encode(
        params["vae"],
        require(config, "vae"),
        images,
        shifted=mask is not None or not net.zero_pooled,
        canny_range=net.kind == "canny" and net.context_width is None,
        mask=mask,
        key=key,
    )


def latent_size(
    config: Config, height: int | None = None, width: int | None = None, *, bounded: bool = True, tiled: bool = True
) -> tuple[int, int]:
    """Height and width of the latents of an image of this size. Raises ValueError where the model cannot draw one.

    `bounded`: by the table of positions, which one evaluation of the transformer has; a run in tiles
    (`tiles`) has no bound. `tiled`: whether there could be tiles, which an error then advises.
    """
    factor, sizes = vae.factor(require(config, "vae")), require(config, "transformer")
    step = factor * sizes.patch_size
    largest = step * sizes.position_size
    sides = []
    for name, side in (("height", height), ("width", width)):
        side = _checked_side(name, sizes.sample_size * factor if side is None else side, step)
        if bounded and side > largest:
            advice = "a larger image can be drawn in tiles (--tile)" if tiled else f"the largest is {largest}"
            raise ValueError(f"{name} {side} is beyond the {largest} pixels that the model has positions for; {advice}")
        sides.append(side // factor)
    return sides[0], sides[1]


def tile_sizes(config: Config, side: int | None = None, overlap: int | None = None) -> tuple[int, int]:
    """Side and overlap in latents of tiles whose sizes are in pixels; by default the model's own size, and a quarter of
    a side. Raises ValueError for a side that the model cannot draw, and an overlap that is not in [0, side).
    """
    factor, sizes = vae.factor(require(config, "vae")), require(config, "transformer")
    side = sizes.sample_size * factor if side is None else _checked_side("tile", side, factor * sizes.patch_size)
    if overlap is not None and not 0 <= overlap < side:
        raise ValueError(f"overlap {overlap} must be at least 0 and below the tile's {side} pixels")
    latents = side // factor
    return latents, latents // 4 if overlap is None else overlap // factor


def _checked_side(name: str, side: int, step: int) -> int:
    if not isinstance(side, SupportsIndex):
        raise ValueError(f"{name} {side!r} must be a whole number of pixels")
    side = index(side)
    if side % step or side < step:
        below = side // step * step
        nearest = f"nearest are {below} and {below + step}" if below > 0 else f"the least is {step}"
        raise ValueError(f"{name} {side} is not a multiple of {step}; {nearest}")
    return side
