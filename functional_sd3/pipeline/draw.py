"""The second stage of a request: the flow is integrated by the transformer, and its latents are decoded by the VAE."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.blend import slerp
from functional_sd3.core.types import Key, Params, Velocity
from functional_sd3.flow.ode.method import State, StepInfo
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.adapters import with_loras
from functional_sd3.pipeline.blending import blend_fields, shares, tiles
from functional_sd3.pipeline.components import Components, device_of, fetch
from functional_sd3.pipeline.edits import edit_latents, flow_edit_latents
from functional_sd3.pipeline.encoding import EncodedPrompts, conditions_of
from functional_sd3.pipeline.fields import Conditions, Field, velocity
from functional_sd3.pipeline.latents import decode, initial_noise, tile_sizes
from functional_sd3.pipeline.masks import keep_masked, latent_mask, restore_kept, unmask_times
from functional_sd3.pipeline.mixing import between
from functional_sd3.pipeline.prepare import Prepared, split_batches
from functional_sd3.pipeline.request import FlowEdit, InversionEdit, Request, needed
from functional_sd3.pipeline.sampling import add_noise, sample, sigmas


def draw(components: Components, config: Config, prepared: Prepared, *, batch: int | None = None) -> Tensor:
    """Images (samples, 3, height, width) of an encoded request, in [0, 1], float32.

    components: name -> parameters (`Components`); the transformer is read once, then the VAE. batch: images integrated
    and decoded at once, by default all. Of a request with `show` all steps: (steps, samples, 3, height, width).
    """
    components, parts = with_loras(components, prepared.request.loras), split_batches(prepared, batch)
    latents = _sample_all({"transformer": fetch(components, "transformer")}, config, parts)
    params = {"vae": fetch(components, "vae")}
    images = [
        torch.stack([decode_latents(params, config, part, step) for step in steps])
        for part, steps in zip(parts, latents, strict=True)
    ]
    joined = images[0] if len(images) == 1 else torch.cat(images, 1)
    return joined[0] if prepared.request.show is None else joined


def sample_latents(params: Params, config: Config, prepared: Prepared) -> Tensor:
    """Latents (samples, channels, height, width), normalised, float32: the request integrated by `transformer`."""
    request, options = prepared.request, vars(prepared.request.sampling)
    device = device_of(params["transformer"])
    if request.edit is not None:
        return _edit(params, config, prepared, request.edit, device)
    conditions, noise, key = _conditions_and_noise(config, prepared, device)
    start = _start(config, prepared, noise)
    field = _field(config, request, noise)
    if request.regions:
        conditions = [conditions, *(_conditions(region, device) for region in prepared.regions)]
    return sample(
        params, config, conditions, start.x, times=start.times, transform=start.transform, field=field, key=key,
        **options,
    )  # fmt: skip


def initial_state(params: Params, config: Config, prepared: Prepared) -> State:
    """The state that `sample_latents` starts from: latents (samples, channels, height, width), float32, at time t.

    Raises ValueError for edits, whose runs do not start from one state.
    """
    if prepared.request.edit is not None:
        raise ValueError("an edit starts from no state of its own: it follows the images' flow back, or beside another")
    _, noise, _ = _conditions_and_noise(config, prepared, device_of(params["transformer"]))
    start = _start(config, prepared, noise)
    times = sigmas(config, noise, prepared.request.sampling.steps) if start.times is None else start.times
    x = start.x.to(torch.promote_types(start.x.dtype, torch.float32))
    return State(x, times[0].to(x), [])


def decode_latents(params: Params, config: Config, prepared: Prepared, latents: Tensor) -> Tensor:
    """Images (batch, 3, height, width) of normalised latents, in tiles and with a mask's kept parts as requested."""
    request, tile = prepared.request, None
    if request.tiling is not None:
        side, overlap = tile_sizes(config, request.tiling.side, request.tiling.overlap)
        tile = max(side, 2 * overlap)
    images, start = decode(params, config, latents, tile=tile), request.start
    if start is None or start.mask is None or not start.restore:
        return images
    return restore_kept(images, start.images.to(images), start.mask.to(images), start.soften)


class _Start(NamedTuple):
    """The state that a run starts from, its times (None: the whole grid), and a transform of its velocity."""

    x: Tensor
    times: Tensor | None = None
    transform: Callable[[Velocity], Velocity] | None = None


def _sample_all(params: Params, config: Config, parts: list[Prepared]) -> list[list[Tensor]]:
    """Latents of each part that are decoded: the last, or those shown of every step."""
    return [_sample_steps(params, config, part) for part in parts]


def _sample_steps(params: Params, config: Config, prepared: Prepared) -> list[Tensor]:
    show, sampling = prepared.request.show, prepared.request.sampling
    if show is None:
        return [sample_latents(params, config, prepared)]
    shown: list[Tensor] = []

    def keep(info: StepInfo) -> None:
        shown.append(show(info))
        if sampling.on_step is not None:
            sampling.on_step(info)

    request = replace(prepared.request, sampling=replace(sampling, on_step=keep))
    sample_latents(params, config, prepared._replace(request=request))
    if not shown:
        strength = needed(request.start, "start images").strength
        raise ValueError(f"show has no step to show: strength {strength} takes none of {sampling.steps} steps")
    return shown


def _conditions(prompts: EncodedPrompts, device: torch.device) -> Conditions:
    # A function of components may put the encoders elsewhere than the transformer.
    return tree.map(lambda part: part.to(device), conditions_of(prompts))


def _conditions_and_noise(config: Config, prepared: Prepared, device: torch.device) -> tuple[Any, Tensor, Key | None]:
    """Inputs of a run: conditions, noise, and the keys of the noise that its method draws."""
    request, conditions = prepared.request, _conditions(prepared.prompts, device)
    size = (request.height, request.width)
    if prepared.places is not None:
        keys, places = needed(prepared.keys, "key"), prepared.places.to(device)
        noises = initial_noise(keys, config, len(keys), *size, device=device)
        noise, conditions = between(noises, conditions, places, needed(request.frames, "frames").mix)
        # A method's own noise is that of the first stop in every frame, so that frames change smoothly.
        return conditions, noise, keys[:1].expand(len(places), 2)
    return conditions, _noise(config, prepared, device), prepared.keys


def _noise(config: Config, prepared: Prepared, device: torch.device) -> Tensor:
    request = prepared.request

    def of(key: Key) -> Tensor:
        size = (request.height, request.width)
        return initial_noise(key, config, prepared.samples, *size, device=device, bounded=request.is_bounded)

    noise = of(needed(prepared.keys, "key")) if request.noise is None else request.noise.to(device)
    if request.variation is None:
        return noise
    amount = request.variation.amount
    amount = amount.to(device) if isinstance(amount, Tensor) else amount
    return slerp(noise, of(request.variation.key), amount)


def _start(config: Config, prepared: Prepared, noise: Tensor) -> _Start:
    start, steps = prepared.request.start, prepared.request.sampling.steps
    if start is None:
        return _Start(noise)
    latents = needed(prepared.latents, "start images").to(noise.device).expand_as(noise)
    x, times = add_noise(config, latents, noise, steps, start.strength)
    if start.mask is None:
        return _Start(x, times)
    mask = latent_mask(start.mask.to(latents), latents, start.soften)
    return _Start(x, times, keep_masked(latents, noise, unmask_times(mask, sigmas(config, noise, steps))))


def _field(config: Config, request: Request, noise: Tensor) -> Field | None:
    """The field of regions and tiles; None for the usual one."""
    field = request.field
    if request.tiling is not None:
        field = tiles(*tile_sizes(config, request.tiling.side, request.tiling.overlap), field or velocity)
    if request.regions:
        return blend_fields(shares(request.regions, config, noise), field or velocity)
    return field


def _edit(
    params: Params, config: Config, prepared: Prepared, edit: InversionEdit | FlowEdit, device: torch.device
) -> Tensor:
    request = prepared.request
    source, start = needed(prepared.source, "source prompts"), needed(request.start, "start images")
    conditions = _conditions(source, device), _conditions(prepared.prompts, device)
    latents = needed(prepared.latents, "start images").to(device)
    latents = latents.expand(prepared.samples, *latents.shape[1:])
    if isinstance(edit, InversionEdit):
        return edit_latents(params, config, conditions, latents, edit, request.sampling, key=prepared.keys)
    key = needed(prepared.keys, "key")
    return flow_edit_latents(params, config, conditions, latents, key, edit, request.sampling, strength=start.strength)
