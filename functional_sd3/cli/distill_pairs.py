"""Pairs of `distill --method reflow`: the teacher's runs from noise, drawn once and kept beside the checkpoints."""

import argparse
from pathlib import Path
from typing import Any

import torch

from functional_sd3 import pipeline
from functional_sd3.cli import report, train_data
from functional_sd3.cli.train_data import Say
from functional_sd3.core import layers, prng
from functional_sd3.core.types import Tree
from functional_sd3.text import conditioning
from functional_sd3.training import continuing, digests, distill_task, reflow
from functional_sd3.weights.model import Model

FOLDER = "pairs"
"""The folder beside the checkpoints that keeps them."""
AT_ONCE = 32
"""Runs of the teacher that are integrated together."""
_READ = ("cfg", "seed", "size", "teacher-steps", "teacher-dtype", "fingerprint of the data")
"""The settings that pairs depend on, beside the model's encoders and transformer."""


def pairs(
    arguments: argparse.Namespace,
    model: Model,
    ids: conditioning.Ids,
    options: distill_task.Settings,
    settings: dict[str, Any],
    say: Say,
) -> Tree:
    """{"noise", "latents"}: for each of the captions, read as `ids`, a noise and the end of the teacher's run from it.

    The run is that of `generate`: by the model's own grid and method, guided by `options.cfg`, in
    `options.teacher_steps` steps. Samples of an earlier run with the same settings are read again. Raises
    WeightsError as `reflow.pairs` does.
    """
    from tqdm import tqdm

    transformer = model.params["transformer"]
    if options.teacher_dtype is not None:
        transformer = layers.cast(transformer, options.teacher_dtype)
    params = {**model.params, "transformer": transformer}
    device, length = transformer["patch"]["weight"].device, train_data.t5_length(model)
    height = width = train_data.latent_side(arguments, model.config)
    run_key, noise_key = prng.split(prng.fold_in(prng.key(arguments.seed), 4)).unbind(-2)
    empty = conditioning.tokenize(model.config, model.tokenizers, [""], t5_length=length)

    def encode(rows: conditioning.Ids) -> conditioning.Conditioning:
        return conditioning.encode(params, model.config, conditioning.Ids(*(part.to(device) for part in rows)))

    negative = encode(empty)

    def draw(numbers: range, noise: torch.Tensor) -> torch.Tensor:
        samples: list[torch.Tensor] = []
        for start in range(0, len(numbers), AT_ONCE):
            rows = numbers[start : start + AT_ONCE]
            positive = encode(conditioning.Ids(*(part[rows.start : rows.stop] for part in ids)))
            blank = conditioning.Conditioning(*(part.expand(len(rows), *part.shape[1:]) for part in negative))
            keys = prng.fold_in(run_key, torch.tensor(list(rows), dtype=torch.int64, device="cpu"))
            samples.append(
                pipeline.sample(
                    params, model.config, pipeline.Conditions(positive, blank),
                    noise[start : start + AT_ONCE].to(device), steps=options.teacher_steps or 1, cfg=options.cfg,
                    key=keys.to(device),
                )
            )  # fmt: skip
        return torch.cat(samples)

    read = [settings[name] for name in _READ] + [
        digest for name, digest in settings.items() if name.startswith(continuing.CONTENTS) and "vae" not in name
    ]
    channels = model.config.transformer.in_channels if model.config.transformer else 0
    with torch.no_grad():
        return reflow.pairs(
            Path(arguments.out) / "checkpoints" / FOLDER, noise_key, len(ids.t5), (channels, height, width), draw,
            contents=digests.combined(map(str, read)), note=say,
            track=lambda parts: tqdm(parts, desc="drawing pairs", leave=False, disable=not report.has_bars()),
        )  # fmt: skip
