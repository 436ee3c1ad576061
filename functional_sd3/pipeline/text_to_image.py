"""From a prompt to a picture: the whole algorithm on one page.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"; the result of diffusers'
`StableDiffusion3Pipeline` for the same noise. Nothing is held between calls, and all of it can be differentiated.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sd3 import weights
from functional_sd3.core import prng
from functional_sd3.core.types import Key, Params
from functional_sd3.flow import ode
from functional_sd3.flow.method import Method, StepInfo
from functional_sd3.image import control as control_image
from functional_sd3.image import pixels, vae
from functional_sd3.pipeline.sampling import Conditions, sample
from functional_sd3.text import conditioning
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.transformer import controlnet
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt
from functional_sd3.weights.model import Config, Tokenizers

T5_LENGTH = 256


def generate(
    params: Params,
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    key: Key,
    *,
    negative: str | Sequence[str] | None = None,
    steps: int = 28,
    cfg: float | Tensor = 5.0,
    height: int | None = None,
    width: int | None = None,
    method: Method = ode.EULER,
    noise: Tensor | None = None,
    on_step: Callable[[StepInfo], Any] | None = None,
    t5_length: int | None = None,
    weighted: bool = False,
    long_prompts: bool = False,
    skip_layers: Sequence[int] = (),
    control: Sequence[Control] = (),
    image_prompt: ImagePrompt | None = None,
) -> Tensor:
    """Pictures of prompts: (batch, 3, height, width) in [0, 1], float32.

    key: (2,), from which sample i takes `fold_in(key, i)`, or (batch, 2), a key for each; noise: the starting latents
    (batch, channels, height / 8, width / 8) instead. negative: "" by default. cfg: guidance scale, 1 for none; a tensor
    () or (batch,) may be differentiated. height, width: in pixels, by default the config's sample size. weighted,
    long_prompts: `(words:1.3)` weighs words, and CLIP reads on beyond its length (`conditioning`). control: ControlNets
    with their pictures, which `control_latents` encodes. image_prompt: an IP-Adapter with the features of an image.
    Raises ValueError for sizes that do not fit.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if noise is None:
        noise = initial_noise(key, config, len(prompts), height, width, device=_device(params))
    told = {"t5_length": t5_length, "weighted": weighted, "long_prompts": long_prompts}
    conditions = encode(params, config, tokenizers, prompts, negative=negative, **told)
    latents = sample(
        params,
        config,
        conditions,
        noise,
        steps=steps,
        cfg=cfg,
        method=method,
        on_step=on_step,
        skip_layers=skip_layers,
        control=control,
        image_prompt=image_prompt,
    )
    return decode(params, config, latents)


def generate_from(
    path: str | os.PathLike | Sequence[str | os.PathLike],
    prompts: str | Sequence[str],
    key: Key,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    quantized: bool = False,
    negative: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    noise: Tensor | None = None,
    t5_length: int | None = None,
    weighted: bool = False,
    long_prompts: bool = False,
    **sampling: Any,
) -> Tensor:
    """`generate` of the model at a path, with one component in memory at a time: encoders, transformer, VAE.

    path, dtype, device, variant, quantized: as of `weights.load`, which is asked for each component when it is its
    turn; what it gave is dropped before the next, so the peak is that of the largest. The rest as of `generate`,
    without gradients.
    """
    outline = weights.outline(path, variant=variant)
    config, prompts = outline.config, [prompts] if isinstance(prompts, str) else list(prompts)
    fetch = weights.fetcher(path, dtype=dtype, device=device, variant=variant, quantized=quantized)
    with torch.no_grad():
        if noise is None:
            noise = initial_noise(key, config, len(prompts), height, width, device=device)
        told = {"t5_length": t5_length, "weighted": weighted, "long_prompts": long_prompts}
        conditions = encode_from(fetch, config, outline.tokenizers, prompts, negative=negative, **told)
        latents = sample({"transformer": fetch("transformer")}, config, conditions, noise, **sampling)
        return decode({"vae": fetch("vae")}, config, latents)


def initial_noise(
    key: Key,
    config: Config,
    count: int,
    height: int | None = None,
    width: int | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Latents to start from, float32 (count, channels, height / 8, width / 8); every sample's from its own key."""
    height, width = latent_size(config, height, width)
    keys = key if key.ndim > 1 else prng.fold_in(key, torch.arange(count, device=key.device))
    if len(keys) != count:
        raise ValueError(f"{len(keys)} keys for {count} prompts; give one key, or one for each prompt")
    return prng.normal(keys, (config.transformer.in_channels, height, width)).to(device)


def encode(
    params: Params,
    config: Config,
    tokenizers: Tokenizers,
    prompts: Sequence[str],
    *,
    negative: str | Sequence[str] | None = None,
    t5_length: int | None = None,
    weighted: bool = False,
    long_prompts: bool = False,
) -> Conditions:
    """Conditioning of the prompts and of what to keep away from, both (batch, ...); options as of `conditioning`."""
    told = {"t5_length": t5_length, "weighted": weighted, "long_prompts": long_prompts}
    texts, told = _both(tokenizers, prompts, negative, told)
    return _halves(conditioning.apply(params, config, tokenizers, texts, **told))


def encode_from(
    fetch: Callable[[str], Params],
    config: Config,
    tokenizers: Tokenizers,
    prompts: Sequence[str],
    *,
    negative: str | Sequence[str] | None = None,
    **told: Any,
) -> Conditions:
    """As `encode`, whose other options these are, with one text encoder in memory at a time: see
    `conditioning.apply_from`."""
    texts, told = _both(tokenizers, prompts, negative, told)
    return _halves(conditioning.apply_from(fetch, config, tokenizers, texts, **told))


def _both(tokenizers, prompts, negative, told: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The prompts and as many negative ones, and the options with a length for T5."""
    negative = [negative or ""] * len(prompts) if negative is None or isinstance(negative, str) else list(negative)
    if len(negative) != len(prompts):
        raise ValueError(f"{len(negative)} negative prompts for {len(prompts)} prompts; give one, or one for each")
    length = told.get("t5_length")
    if length is None:
        length = T5_LENGTH if tokenizers.t5 is None else min(T5_LENGTH, tokenizers.t5.model_max_length)
    return [*prompts, *negative], {**told, "t5_length": length}


def _halves(both: Conditioning) -> Conditions:
    return Conditions(*(Conditioning(*parts) for parts in zip(*(part.chunk(2) for part in both), strict=True)))


def control_latents(
    params: Params,
    config: Config,
    images: Tensor,
    net: controlnet.Config,
    *,
    mask: Tensor | None = None,
    key: Key | None = None,
) -> Tensor:
    """What a ControlNet reads of pictures: images (batch, 3, height, width) in [0, 1] -> `Control.image_latents`.

    mask (batch or 1, 1, height, width): for a ControlNet with a channel more, 1 where the picture is to be painted
    anew. key: draws from the VAE's posterior, as diffusers does; by default its mean is taken. Raises ValueError when
    a mask is missing or not wanted.
    """
    if (mask is None) != (net.extra_channels == 0):
        wanted = "wants a mask" if mask is None else "wants none"
        raise ValueError(f"this ControlNet reads {net.extra_channels} channels beside the latents: it {wanted}")
    return control_image.encode(
        params["vae"],
        config.vae,
        images,
        shifted=mask is not None or not net.zero_pooled,
        wide=net.kind == "canny" and net.context_width is None,
        mask=mask,
        key=key,
    )


def decode(params: Params, config: Config, latents: Tensor) -> Tensor:
    """Normalised latents -> pictures (batch, 3, height, width) in [0, 1], float32."""
    dtype = params["vae"]["decoder"]["conv_in"]["weight"].dtype
    images = vae.decode(params["vae"], config.vae, vae.denormalize(config.vae, latents).to(dtype))
    return pixels.from_signed(images.float())


def latent_size(config: Config, height: int | None = None, width: int | None = None) -> tuple[int, int]:
    """Height and width of the latents of a picture of this size; ValueError where the model cannot make one."""
    factor = vae.factor(config.vae)
    step = factor * config.transformer.patch_size
    largest = step * config.transformer.position_size
    sides = []
    for name, side in (("height", height), ("width", width)):
        side = config.transformer.sample_size * factor if side is None else side
        if side % step or side < step:
            below = side // step * step
            nearest = f"nearest are {below} and {below + step}" if below > 0 else f"the least is {step}"
            raise ValueError(f"{name} {side} is not a multiple of {step}; {nearest}")
        if side > largest:
            raise ValueError(f"{name} {side} is beyond the {largest} pixels that the model has positions for")
        sides.append(side // factor)
    return sides[0], sides[1]


def _device(params: Params) -> torch.device:
    return params["transformer"]["patch"]["weight"].device
