"""The pictures of `generate`: batch by batch with the whole model, or part by part of the model with all batches."""

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3 import pipeline
from functional_sd3.cli import session
from functional_sd3.cli.session import Session
from functional_sd3.cli.written import Job
from functional_sd3.core import prng
from functional_sd3.core.types import Params
from functional_sd3.pipeline import Conditions
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.transformer.control import Control


class Run(NamedTuple):
    """What every batch shares; size: width and height in pixels; bar: counts steps."""

    session: Session
    size: tuple[int, int]
    control: Sequence[Control]
    bar: Any


def batches(jobs: list[Job], size: int, *, alone: bool) -> list[list[Job]]:
    """Jobs to be drawn at once; `alone`: never of two prompts, whose lengths would change one another's context."""
    groups = [list(group) for _, group in itertools.groupby(jobs, key=lambda job: job[0])] if alone else [jobs]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


@torch.no_grad()
def together(run: Run, batches: Sequence[list[Job]], arguments: argparse.Namespace) -> Tensor:
    """The pictures (count, 3, height, width), with everything in memory."""
    opened = run.session
    encoders = [name for name in ("clip_l", "clip_g", "t5") if getattr(opened.config, name) is not None]
    params = {name: opened.fetch(name) for name in (*encoders, "transformer", "vae")}
    images = []
    for jobs in batches:
        prompts = [prompt for prompt, _ in jobs]
        conditions = pipeline.encode(params, opened.config, opened.tokenizers, prompts, **session.told(arguments))
        opened.timer.done("text", opened.device)
        latents = _sample(run, params, conditions, jobs, arguments)
        images.append(_decode(run, params, latents))
    return torch.cat(images)


@torch.no_grad()
def offloaded(run: Run, batches: Sequence[list[Job]], arguments: argparse.Namespace) -> Tensor:
    """The same, with one text encoder, the transformer or the VAE in memory at a time, each for all batches."""
    opened = run.session
    found = _conditions(run, batches, arguments)
    opened.timer.done("text", opened.device)
    transformer = {"transformer": opened.fetch("transformer")}
    opened.timer.done("load", opened.device)
    latents = [_sample(run, transformer, found(jobs), jobs, arguments) for jobs in batches]
    del transformer
    decoder = {"vae": opened.fetch("vae")}
    opened.timer.done("load", opened.device)
    return torch.cat([_decode(run, decoder, part) for part in latents])


def _conditions(run: Run, batches: Sequence[list[Job]], arguments) -> Callable[[list[Job]], Conditions]:
    """The conditions of a batch, from every text read once."""
    opened = run.session
    prompts = list(dict.fromkeys(prompt for jobs in batches for prompt, _ in jobs))
    # Prompts of several lengths would lengthen one another's context, so with --long each is read by itself.
    groups = [[prompt] for prompt in prompts] if arguments.long else [prompts]
    rows: dict[str, Conditions] = {}
    for group in groups:
        both = pipeline.encode_from(opened.fetch, opened.config, opened.tokenizers, group, **session.told(arguments))
        for index, prompt in enumerate(group):
            rows[prompt] = Conditions(*(Conditioning(*(part[index : index + 1] for part in half)) for half in both))

    def of(jobs: list[Job]) -> Conditions:
        chosen = [rows[prompt] for prompt, _ in jobs]
        halves = zip(*chosen, strict=True)
        return Conditions(*(Conditioning(*map(torch.cat, zip(*half, strict=True))) for half in halves))

    return of


def _sample(run: Run, params: dict[str, Params], conditions: Conditions, jobs: list[Job], arguments) -> Tensor:
    opened = run.session
    keys = torch.stack([prng.key(seed) for _, seed in jobs])
    width, height = run.size
    noise = pipeline.initial_noise(keys, opened.config, len(jobs), height, width, device=opened.device)
    latents = pipeline.sample(
        params,
        opened.config,
        conditions,
        noise,
        control=run.control,
        on_step=lambda info: run.bar.update(),
        **session.sampling(opened, arguments),
    )
    opened.timer.done("sampling", opened.device)
    return latents


def _decode(run: Run, params: dict[str, Params], latents: Tensor) -> Tensor:
    images = pipeline.decode(params, run.session.config, latents).cpu()
    run.session.timer.done("decoding", run.session.device)
    return images
