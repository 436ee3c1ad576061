"""Scores of prompts at the same random draws, and the certainty of their ranking, for `likelihood`."""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functional_sd3.cli import runtime
from functional_sd3.cli.report import Report
from functional_sd3.core import prng
from functional_sd3.core.types import Velocity
from functional_sd3.flow import ode
from functional_sd3.flow.analysis import likelihood

MEAN = tuple(ode.MEAN)
UNFIT = (*ode.STOCHASTIC, *MEAN)
FIT = (*ode.METHODS, *ode.ADAPTIVE)


def ticks(arguments: argparse.Namespace) -> int:
    """Number of calls of on_step by `scores`."""
    return arguments.steps if arguments.by == "likelihood" else arguments.draws


def scores(
    velocity: Velocity, latents: Tensor, arguments: argparse.Namespace, on_step: Callable[[Any], Any] | None = None
) -> Tensor:
    """(draws, batch), higher is better: log-likelihoods in nats as each probe sees them, or losses with their sign
    turned. Row by row the same draws for all samples, which are one image (batch, ...) under several prompts."""
    keys = prng.key(arguments.seed, device=latents.device).expand(len(latents), 2)
    if arguments.by == "loss":
        return -likelihood.losses(velocity, latents, keys, draws=arguments.draws, on_draw=on_step)
    estimate = likelihood.estimate(
        velocity,
        latents,
        method=runtime.method(arguments.method, rtol=arguments.rtol, atol=arguments.atol),
        times=times(arguments.steps),
        divergence="exact" if arguments.exact else "hutchinson",
        key=keys,
        probes=arguments.probes,
        # Cheaper than forward mode.
        mode="reverse",
        on_step=on_step,
    )
    return estimate.log_prior + estimate.volumes


def times(steps: int) -> Tensor:
    """(steps + 1,) from 0 to 1, t = s^2 for even s: near the data the divergence grows like 1 / t."""
    return torch.linspace(0, 1, steps + 1, dtype=torch.float32, device="cpu").square()


def report(arguments: argparse.Namespace, prompts: list[str], scores: Tensor, dimensions: int) -> Report:
    """The prompts from best to worst."""
    by_likelihood, means = arguments.by == "likelihood", scores.mean(0)
    if by_likelihood and arguments.exact:
        # Nothing was drawn.
        error, behind, behind_error = torch.zeros_like(means), means.max() - means, torch.zeros_like(means)
    else:
        error, (behind, behind_error) = likelihood.standard_error(scores), likelihood.advantage(scores)
    bits = likelihood.bits_per_dimension(means, dimensions)
    rows, lines = [], []
    for index in means.argsort(descending=True, stable=True).tolist():
        score = {"log_likelihood": means[index]} if by_likelihood else {"loss": -means[index]}
        score["standard_error"] = error[index]
        if by_likelihood:
            score["bits_per_dimension"] = bits[index]
        score |= {"behind": behind[index], "behind_standard_error": behind_error[index]}
        row: dict[str, Any] = {"prompt": prompts[index], **{name: float(value) for name, value in score.items()}}
        rows.append(row)
        lines.append(_line(row, by_likelihood))
    data = {
        "picture": arguments.image,
        "by": arguments.by,
        "dimensions": dimensions,
        **{name: getattr(arguments, name) for name in _settings(arguments)},
        "params": arguments.params or [],
        "prompts": rows,
    }
    return Report((_head(arguments, dimensions), *lines), data)


def _settings(arguments: argparse.Namespace) -> tuple[str, ...]:
    if arguments.by == "loss":
        return ("draws", "cfg", "seed")
    return (
        ("steps", "method", "exact", "cfg", "seed") if arguments.exact else ("steps", "method", "probes", "cfg", "seed")
    )


def _head(arguments: argparse.Namespace, dimensions: int) -> str:
    if arguments.by == "loss":
        what = f"loss, behind the best, prompt ({arguments.draws} draws; no likelihood)"
    else:
        how = "exact divergence" if arguments.exact else f"probes: {arguments.probes}"
        adaptive = arguments.method in ode.ADAPTIVE
        run = arguments.method if adaptive else f"{arguments.steps} steps of {arguments.method}"
        what = f"log-likelihood in nats, bits per dimension, nats behind the best, prompt ({run}, {how})"
    return f"{arguments.image}, {dimensions:,} numbers of latents: {what}"


def _line(row: dict[str, Any], by_likelihood: bool) -> str:
    if by_likelihood:
        score = f"{row['log_likelihood']:10.1f}{_pm(row['standard_error'], 1)}  {row['bits_per_dimension']:8.4f}"
        return f"{score}  {row['behind']:9.1f}{_pm(row['behind_standard_error'], 1)}  {row['prompt']}"
    score = f"{row['loss']:10.5f}{_pm(row['standard_error'], 5)}"
    return f"{score}  {row['behind']:9.5f}{_pm(row['behind_standard_error'], 5)}  {row['prompt']}"


def _pm(error: float, digits: int) -> str:
    return "" if math.isnan(error) or error == 0 else f" ± {error:.{digits}f}"
