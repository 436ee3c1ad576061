"""A picture told by another prompt: back to the noise that it would come from, and from there along another flow.

Rout et al. 2024, "Semantic Image Inversion and Editing using Rectified Stochastic Differential Equations",
arXiv:2410.10792, in this project's time (t = 1 is noise); Kulikov et al. 2024, "FlowEdit", arXiv:2412.08629.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key, Params, Velocity
from functional_sd3.flow import ode, path, schedule
from functional_sd3.flow.ode.method import Method
from functional_sd3.flow.path import broadcast
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.fields import Conditions, velocity
from functional_sd3.pipeline.image_to_image import divided, paired
from functional_sd3.pipeline.latents import decode, encode_images, sample_keys
from functional_sd3.pipeline.sampling import sample, sigmas
from functional_sd3.pipeline.text_to_image import encode
from functional_sd3.weights.model import Tokenizers

Transform = Callable[[Velocity], Velocity]


def edit(
    params: Params,
    config: Config,
    tokenizers: Tokenizers,
    source: str | Sequence[str],
    target: str | Sequence[str],
    images: Tensor,
    *,
    eta: float | Tensor = 0.9,
    window: tuple[float, float] = (0.0, 0.25),
    source_cfg: float | Tensor = 1.0,
    cfg: float | Tensor = 5.0,
    posterior_key: Key | None = None,
    **options: Any,
) -> Tensor:
    """Pictures as the target prompts tell them: (batch, 3, height, width) in [0, 1], float32.

    images (batch, 3, height, width) in [0, 1] of the source prompts are inverted: the flow of the source, guided by
    `source_cfg`, is followed from data to noise. The flow of the target, guided by `cfg`, leads back. It is drawn to
    the pictures by `eta` in [0, 1] (`drawn_to`; () or (batch,)) during the steps of `window`, fractions of the run as
    of a ControlNet: 0 is the target's flow alone, 1 up to the end gives the pictures back. options: of `generate`, for
    both runs but for `guidance`, which is the target's, and `inversion` of `inverted`.

    Raises ValueError for an eta or window outside [0, 1], and as `image_to_image`.
    """
    words, run = divided(options)
    latents, told = _read(params, config, tokenizers, source, target, images, posterior_key, words)
    scales = {"source_cfg": source_cfg, "cfg": cfg}
    return decode(params, config, edited(params, config, told, latents, eta=eta, window=window, **scales, **run))


def edited(
    params: Params,
    config: Config,
    conditions: tuple[Conditions, Conditions],
    latents: Tensor,
    *,
    eta: float | Tensor = 0.9,
    window: tuple[float, float] = (0.0, 0.25),
    source_cfg: float | Tensor = 1.0,
    cfg: float | Tensor = 5.0,
    steps: int = 28,
    inversion: Callable[[Method], Method] | None = None,
    **options: Any,
) -> Tensor:
    """The latents of `edit`, from latents and the conditions (source, target); options as of `sample`, whose method is
    Euler's by default, since a run that draws noise leads back to nothing."""
    options = {"method": ode.EULER, **options}
    draw = drawn_to(latents, eta, *spanned(sigmas(config, latents, steps), *window))
    source, target = conditions
    back = {"steps": steps, "cfg": source_cfg, "inversion": inversion, **_without_guidance(options)}
    noise = inverted(params, config, source, latents, **back)
    return sample(params, config, target, noise, steps=steps, cfg=cfg, transform=draw, **options)


def inverted(
    params: Params,
    config: Config,
    conditions: Conditions,
    latents: Tensor,
    *,
    steps: int = 28,
    cfg: float | Tensor = 1.0,
    method: Method | ode.Adaptive = ode.EULER,
    inversion: Callable[[Method], Method] | None = None,
    **options: Any,
) -> Tensor:
    """The noise that the flow of the conditions comes from to the latents; options as of `sample`.

    inversion: how a method's steps are undone, `fixed_point.inverse` for instance, several evaluations a step: then
    `sample` leads from the noise to the latents again. By default the flow is followed back with the method itself.
    """
    times = sigmas(config, latents, steps).flip(0)
    undone = method if inversion is None else inversion(method)
    return sample(params, config, conditions, latents, cfg=cfg, times=times, method=undone, **options)


def drawn_to(
    end: Tensor, eta: float | Tensor, first: Tensor | float, last: Tensor | float, place: float = 0.0
) -> Transform:
    """Velocity -> velocity: v + eta ((x - end) / (t - place) - v) from time `first` on, as long as t > `last`.

    (x - end) / (t - place) is the straight line that is at `end` at the time `place`: Rout et al. 2024, eq. 15, with
    the data at place 0; with a noise at place 1, eq. 8, for runs from data to noise. At its own place no line leads to
    it, and a method that asks there (`ode.HEUN`, not `ode.HEUN_EDM`) hears v. eta in [0, 1], () or (batch,).
    Raises ValueError for an eta outside, where it is a number.
    """
    if not isinstance(eta, Tensor) and not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} must be between 0 (the flow alone) and 1 (straight to the image)")

    def transform(velocity: Velocity) -> Velocity:
        def drawn(x: Tensor, t: Tensor) -> Tensor:
            plain, distance = velocity(x, t), broadcast(t, x) - place
            heard = (broadcast(t, x) <= first) & (broadcast(t, x) > last) & (distance != 0)
            straight = (x - end) / torch.where(heard, distance, 1.0)
            return plain + torch.where(heard, broadcast(eta, x) * (straight - plain), 0.0)

        return drawn

    return transform


def spanned(grid: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
    """The times between which a part of a run lies: of n steps those with start <= i / n and (i + 1) / n <= end, the
    rule of ControlNets. Raises ValueError unless 0 <= start <= end <= 1."""
    if not 0 <= start <= end <= 1:
        raise ValueError(f"window {start} to {end} must be 0 <= start <= end <= 1: fractions of the run")
    steps = len(grid) - 1
    heard = [step for step in range(steps) if start <= step / steps and (step + 1) / steps <= end]
    return (grid[heard[0]], grid[heard[-1] + 1]) if heard else (grid[0], grid[0])


def flow_edit(
    params: Params,
    config: Config,
    tokenizers: Tokenizers,
    source: str | Sequence[str],
    target: str | Sequence[str],
    images: Tensor,
    key: Key,
    *,
    strength: float = 0.66,
    source_cfg: float | Tensor = 3.5,
    cfg: float | Tensor = 13.5,
    averages: int = 1,
    steps: int = 50,
    posterior_key: Key | None = None,
    **options: Any,
) -> Tensor:
    """Pictures as the target prompts tell them, without inverting them: (batch, 3, height, width) in [0, 1], float32.

    FlowEdit: the picture z itself moves, along v_target(z + x_t - x_0, t) - v_source(x_t, t) with x_t = (1 - t) x_0 +
    t noise, the mean over `averages` noises, new ones at every time from `key`. strength: the part of the steps that is
    taken, n_max / T of the paper, whose values for SD3 are the defaults; 0 gives the pictures back. With the same
    prompts and scales nothing moves. options: of `generate`; `guidance` is the target's.
    """
    words, run = divided(options)
    latents, told = _read(params, config, tokenizers, source, target, images, posterior_key, words)
    run |= {"strength": strength, "source_cfg": source_cfg, "cfg": cfg, "averages": averages, "steps": steps}
    return decode(params, config, flow_edited(params, config, told, latents, key, **run))


def flow_edited(
    params: Params,
    config: Config,
    conditions: tuple[Conditions, Conditions],
    latents: Tensor,
    key: Key,
    *,
    strength: float = 0.66,
    source_cfg: float | Tensor = 3.5,
    cfg: float | Tensor = 13.5,
    averages: int = 1,
    steps: int = 50,
    **options: Any,
) -> Tensor:
    """The latents of `flow_edit`, from latents and the conditions (source, target); options as of `sample`, whose
    method is Euler's by default."""
    options = {"method": ode.EULER, **options}
    if averages < 1:
        raise ValueError(f"averages {averages} must be at least 1")
    grid, keys = sigmas(config, latents, steps), sample_keys(key, len(latents))

    def noises(t: Tensor) -> list[Tensor]:
        at = prng.fold_in(keys, schedule.position(grid, t))
        return [prng.normal(prng.fold_in(at, each), latents.shape[1:]).to(latents) for each in range(averages)]

    field, times = difference(latents, noises, source_cfg), schedule.partial(grid, strength)
    return sample(params, config, conditions, latents, cfg=cfg, times=times, field=field, **options)


def difference(
    latents: Tensor, noises: Callable[[Tensor], Sequence[Tensor]], source_cfg: float | Tensor
) -> Callable[..., Velocity]:
    """The field of `flow_edit`, of the conditions (source, target): by how much their velocities differ."""

    def make(
        params: Params,
        config: Config,
        conditions: tuple[Conditions, Conditions],
        cfg: float | Tensor = 5.0,
        times: Tensor | None = None,
        **options: Any,
    ) -> Velocity:
        source = velocity(params, config, conditions[0], source_cfg, times, **_without_guidance(options))
        target = velocity(params, config, conditions[1], cfg, times, **options)

        def moved(z: Tensor, t: Tensor) -> Tensor:
            seen = [path.interpolate(latents, noise, t) for noise in noises(t)]
            steps = [target(z + x - latents, t) - source(x, t) for x in seen]
            return torch.stack(steps).mean(0)

        return moved

    return make


def _without_guidance(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "guidance"}


def _read(
    params: Params,
    config: Config,
    tokenizers: Tokenizers,
    source: str | Sequence[str],
    target: str | Sequence[str],
    images: Tensor,
    posterior_key: Key | None,
    words: dict[str, Any],
) -> tuple[Tensor, tuple[Conditions, Conditions]]:
    """Latents of the pictures, and the conditions (source, target), as many of each."""
    # The source twice: the target may have brought more pictures.
    source, images = paired(source, images)
    target, images = paired(target, images)
    source, images = paired(source, images)
    latents = encode_images(params, config, images, key=posterior_key)
    source, target = (encode(params, config, tokenizers, texts, **words) for texts in (source, target))
    return latents, (source, target)
