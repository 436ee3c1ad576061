"""The images of `generate`: batch by batch with the whole model, or part by part of the model with all batches."""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3 import pipeline
from functional_sd3.cli import session
from functional_sd3.cli.inputs import Picture
from functional_sd3.cli.regions import Regions
from functional_sd3.cli.session import Session
from functional_sd3.cli.written import Job
from functional_sd3.core import prng
from functional_sd3.core.types import Params, Velocity
from functional_sd3.image import vae
from functional_sd3.pipeline import Conditions
from functional_sd3.transformer.control import Control


class Run(NamedTuple):
    """What every batch shares; size: width and height in pixels; tile: side and overlap of tiles in pixels; bar: counts
    steps."""

    session: Session
    size: tuple[int, int]
    control: Sequence[Control]
    bar: Any
    begun: Picture | None = None
    regions: Regions | None = None
    tile: tuple[int, int] | None = None


def batches(jobs: list[Job], size: int, *, alone: bool) -> list[list[Job]]:
    """Jobs to be drawn at once; `alone`: never of two prompts, whose lengths would change one another's context."""
    groups = [list(group) for _, group in itertools.groupby(jobs, key=lambda job: job.prompt)] if alone else [jobs]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


@torch.no_grad()
def together(run: Run, batches: Sequence[list[Job]], arguments: argparse.Namespace) -> Iterator[Tensor]:
    """The pictures (count, 3, height, width) of each batch as soon as they are drawn, with everything in memory."""
    opened = run.session
    encoders = [name for name in ("clip_l", "clip_g", "t5") if getattr(opened.config, name) is not None]
    params = {name: opened.fetch(name) for name in (*encoders, "transformer", "vae")}
    for jobs in batches:
        opened.timer.stage = "reading the prompts"
        prompts = [job.prompt for job in jobs]
        conditions = pipeline.encode(params, opened.config, opened.tokenizers, prompts, **session.told(arguments))
        opened.timer.done("text", opened.device)
        latents = _sample(run, params, conditions, jobs, arguments)
        yield _decode(run, params, latents)


@torch.no_grad()
def offloaded(run: Run, batches: Sequence[list[Job]], arguments: argparse.Namespace) -> Iterator[Tensor]:
    """The same, with one text encoder, the transformer or the VAE in memory at a time, each for all batches."""
    opened = run.session
    opened.timer.stage = "reading the prompts"
    found = _conditions(run, batches, arguments)
    opened.timer.done("text", opened.device)
    transformer = {"transformer": opened.fetch("transformer")}
    opened.timer.done("load", opened.device)
    latents = [_sample(run, transformer, found(jobs), jobs, arguments) for jobs in batches]
    del transformer
    decoder = {"vae": opened.fetch("vae")}
    opened.timer.done("load", opened.device)
    for part in latents:
        yield _decode(run, decoder, part)


def _conditions(run: Run, batches: Sequence[list[Job]], arguments) -> Callable[[list[Job]], Conditions]:
    """The conditions of a batch, from every text read once."""
    opened = run.session
    prompts = list(dict.fromkeys(job.prompt for jobs in batches for job in jobs))
    # Prompts of several lengths would lengthen one another's context, so with --long each is read by itself.
    groups = [[prompt] for prompt in prompts] if arguments.long else [prompts]
    rows: dict[str, Conditions] = {}
    for group in groups:
        both = pipeline.encode_from(opened.fetch, opened.config, opened.tokenizers, group, **session.told(arguments))
        for index, prompt in enumerate(group):
            rows[prompt] = pipeline.rows(both, slice(index, index + 1))
    return lambda jobs: pipeline.joined([rows[job.prompt] for job in jobs])


def _sample(run: Run, params: dict[str, Params], conditions: Conditions, jobs: list[Job], arguments) -> Tensor:
    opened, config = run.session, run.session.config
    opened.timer.stage = "sampling"
    keys = torch.stack([prng.key(job.seed) for job in jobs])
    noise, extras = _noise(run, jobs, keys), {}
    start = noise
    if run.begun is not None:
        latents = run.begun.latents.expand_as(noise)
        start, extras["times"] = pipeline.begin(config, latents, noise, arguments.steps, run.begun.strength)
        if run.begun.mask is not None:
            mask = pipeline.latent_mask(run.begun.mask, latents, run.begun.soften)
            release = pipeline.release_times(mask, pipeline.sigmas(config, noise, arguments.steps))
            extras["transform"] = pipeline.holding(latents, noise, release)
    told: Any = conditions
    if run.regions is not None:
        told = [conditions, *(pipeline.joined([one] * len(jobs)) for one in run.regions.conditions)]
    latents = pipeline.sample(
        params,
        config,
        told,
        start,
        control=run.control,
        on_step=lambda info: run.bar.update(),
        field=_field(run),
        **extras,
        **session.sampling(opened, arguments, keys),
    )
    opened.timer.done("sampling", opened.device)
    return latents


def _noise(run: Run, jobs: list[Job], keys: Tensor) -> Tensor:
    opened, (width, height) = run.session, run.size
    options = {"device": opened.device, "bounded": run.tile is None}
    noise = pipeline.initial_noise(keys, opened.config, len(jobs), height, width, **options)
    if jobs[0].towards is None:
        return noise
    others = torch.stack([prng.key(job.towards) for job in jobs])
    far = pipeline.initial_noise(others, opened.config, len(jobs), height, width, **options)
    amounts = torch.tensor([job.amount for job in jobs], dtype=torch.float32, device=opened.device)
    return pipeline.slerp(noise, far, amounts)


def _field(run: Run) -> Callable[..., Velocity] | None:
    """What makes the velocity of regions and tiles; None for the usual one."""
    field = None
    if run.tile is not None:
        factor = vae.factor(run.session.config.vae)
        field = pipeline.tiles(*(side // factor for side in run.tile))
    if run.regions is not None:
        return pipeline.blended(run.regions.shares, field or pipeline.velocity)
    return field


def _decode(run: Run, params: dict[str, Params], latents: Tensor) -> Tensor:
    tile = None
    run.session.timer.stage = "decoding"
    if run.tile is not None:
        tile = max(run.tile) // vae.factor(run.session.config.vae)
    images = pipeline.decode(params, run.session.config, latents, tile=tile)
    if run.begun is not None and run.begun.restore:
        images = pipeline.restored(images, run.begun.image, run.begun.mask, run.begun.soften)
    images = images.cpu()
    run.session.timer.done("decoding", run.session.device)
    return images
