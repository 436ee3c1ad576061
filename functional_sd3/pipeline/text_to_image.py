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
from functional_sd3.core import tree
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key, Params
from functional_sd3.flow import ode
from functional_sd3.flow.guidance import Guidance, check_scale
from functional_sd3.flow.ode.method import Method, StepInfo
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.latents import decode, initial_noise
from functional_sd3.pipeline.sampling import Conditions, sample
from functional_sd3.text import conditioning
from functional_sd3.text.conditioning import Conditioning, Ids
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt
from functional_sd3.weights.default_dtype import Dtype
from functional_sd3.weights.model import Tokenizers

T5_LENGTH = 256


def generate(
    params: Params | Callable[[str], Params],
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    key: Key,
    *,
    negative: str | Sequence[str] | None = None,
    steps: int = 28,
    cfg: float | Tensor = 5.0,
    guidance: Guidance | None = None,
    height: int | None = None,
    width: int | None = None,
    method: Method | ode.Adaptive | None = None,
    noise: Tensor | None = None,
    on_step: Callable[[StepInfo], Any] | None = None,
    t5_length: int | None = None,
    weighted: bool = False,
    long_prompts: bool = False,
    skip_layers: Sequence[int] = (),
    control: Sequence[Control] = (),
    image_prompt: ImagePrompt | None = None,
    block_transform: Callable[[Callable], Callable] | None = None,
    implementation: Implementation = "sdpa",
    offload: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Pictures of prompts: (batch, 3, height, width) in [0, 1], float32.

    key: (2,), from which sample i takes `fold_in(key, i)`, or (batch, 2), a key for each; noise: the starting latents
    (batch, channels, height / 8, width / 8) instead. negative: "" by default. cfg: guidance scale, 1 for none; a tensor
    () or (batch,) may be differentiated. guidance: another than `guidance.cfg(cfg)`, such as `guidance.apg(5.0)`;
    cfg is then not looked at. method: by default that of the model's scheduler config, as of `sample`. height, width:
    in pixels, by default the config's sample size. weighted, long_prompts: `(words:1.3)` weighs words, and CLIP reads
    on beyond its length (`conditioning`). control: ControlNets with their pictures, which `control_latents` encodes.
    image_prompt: an IP-Adapter with the features of an image.
    block_transform: applied to the function that applies a block of the transformer, such as `transform.compile`.
    implementation: of the transformer's attention, as of `mmdit.apply`.

    offload: one component at a time: each text encoder, the transformer, the VAE, taken when it is its turn and dropped
    before the next, so that the peak is that of the largest. `params` may then also be a function from a component's
    name to its parameters, asked once for each, such as `weights.fetcher(path)`. device: where to compute, by default
    where the parameters are; a tree's components are moved there, with `offload` each for its turn only, and what
    `control` and `image_prompt` hold is the caller's to place. With gradients a graph holds on to the components, so
    `torch.no_grad()` belongs around an offloaded run.
    Raises ValueError for sizes that do not fit, a cfg that is not finite, and for a function of components without
    `offload`.
    """
    check_scale(cfg, "cfg")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if noise is None:
        noise = initial_noise(key, config, len(prompts), height, width, device=device or _device(params))
    told = {"negative": negative, "t5_length": t5_length, "weighted": weighted, "long_prompts": long_prompts}
    if offload:
        fetch, told["names"] = _by_turns(params, device)
        conditions = encode_from(fetch, config, tokenizers, prompts, **told)
    elif callable(params):
        raise ValueError("a function of components is asked for one after another: give offload=True, or their tree")
    else:
        params = params if device is None else tree.to(params, device)
        fetch = params.__getitem__
        conditions = encode(params, config, tokenizers, prompts, **told)
    latents = _drawn(
        {"transformer": fetch("transformer")},
        config,
        conditions,
        noise,
        steps=steps,
        cfg=cfg,
        guidance=guidance,
        method=method,
        key=key,
        on_step=on_step,
        skip_layers=skip_layers,
        control=control,
        image_prompt=image_prompt,
        block_transform=block_transform,
        implementation=implementation,
        # Who keeps one component at a time wants the memory, not the time.
    )
    return decode({"vae": fetch("vae")}, config, latents)


def generate_from(
    path: str | os.PathLike | Sequence[str | os.PathLike],
    prompts: str | Sequence[str],
    key: Key,
    *,
    dtype: Dtype = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    quantized: bool = False,
    **options: Any,
) -> Tensor:
    """`generate` of the model at a path, with one component in memory at a time: `offload`, without gradients.

    path, dtype, device, variant, quantized: as of `weights.load`, which is asked for each component when it is its
    turn. The rest as of `generate`.
    """
    outline = weights.outline(path, variant=variant)
    fetch = weights.fetcher(path, dtype=dtype, device=device, variant=variant, quantized=quantized)
    with torch.no_grad():
        return generate(
            fetch, outline.config, outline.tokenizers, prompts, key, device=device, offload=True, **options
        )


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


def _drawn(params: Params, config: Config, conditions: Conditions, noise: Tensor, **options: Any) -> Tensor:
    # Only the parameters say where a function of components puts them, and without encoders nothing else knows.
    place = _device(params)
    conditions = tree.map(lambda part: part.to(place), conditions)
    return sample(params, config, conditions, noise.to(place), **options)


def _by_turns(params: Params | Callable[[str], Params], device: torch.device | str | None):
    """A function that gives a component for its turn, and the encoders that there are, None where the config says."""
    take, there = params, None
    if not callable(params):
        take, there = params.__getitem__, [name for name in Ids._fields if name in params]
    return (take if device is None else lambda name: tree.to(take(name), device)), there


def _device(params: Params | Callable[[str], Params]) -> torch.device:
    return torch.device("cpu") if callable(params) else params["transformer"]["patch"]["weight"].device
