"""`--lora FILE[=SCALE]` of the commands that draw: LoRAs added lazily to the parameters as they are read."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from functional_sd3.cli import report
from functional_sd3.formats.printable import shorten

if TYPE_CHECKING:
    import torch

    from functional_sd3.core.types import Params
    from functional_sd3.layouts.components import Config
    from functional_sd3.lora.tree import Lora
    from functional_sd3.pipeline import Components
    from functional_sd3.weights.model import Model


class LoraSpec(NamedTuple):
    """A file, or a folder that holds one, and its scale."""

    path: Path
    scale: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[=SCALE]",
        help="a LoRA and its strength (default 1); given several times, they add up",
    )


def parse(text: str, option: str = "--lora ") -> LoraSpec:
    """The file and scale of one `FILE[=SCALE]`; a file whose whole name is there counts before a scale.

    Raises ValueError for a file that does not exist and for a scale that is no finite number.
    """
    if text and os.path.exists(text):
        return LoraSpec(Path(text), 1.0)
    name, equals, word = text.rpartition("=")
    if not equals:
        name, colon, word = text.rpartition(":")
        hint = f"; a scale follows =: {shorten(name, 300)}={shorten(word)}" if colon and os.path.exists(name) else ""
        raise ValueError(f"{option}{shorten(text, 300)}: no such file{hint}")
    if not (name and os.path.exists(name)):
        raise ValueError(f"{option}{shorten(text, 300)}: there is no file {shorten(name, 300)}")
    try:
        scale = float(word)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise ValueError(f"{option}{shorten(text, 300)}: the scale {shorten(word)!r} must be a number, such as 0.8")
    return LoraSpec(Path(name), scale)


def check(texts: Sequence[str]) -> None:
    """Raises ValueError for options that make no sense, WeightsError for files without a LoRA, before models load."""
    from functional_sd3 import lora

    for spec in map(parse, texts):
        lora.layers(spec.path)


def load(texts: Sequence[str], config: "Config", device: "torch.device") -> "list[tuple[Lora, float]]":
    """The LoRAs of these options with their scales; those of scale 0 are checked, then left out.

    Parts for a component that the model lacks (T5 is often given up), and embeddings that OneTrainer stores beside, are
    left out and named on standard error.
    """
    from functional_sd3 import lora

    loras = []
    for spec in map(parse, texts):
        loaded = lora.load_with_report(spec.path, config, device=device, allow_absent=True)
        note_left_out(spec.path, loaded.left_out)
        loras += [(loaded.lora, spec.scale)] if spec.scale != 0 else []
    return loras


def student_config(texts: Sequence[str], config: "Config") -> "Config":
    """The config with the scheduler of a LoRA that makes the model a student of few steps, as `distill` writes it, and
    with the embedder of t - r that it brings.

    Raises ValueError for two that differ.
    """
    from dataclasses import replace

    from functional_sd3.formats import files
    from functional_sd3.lora import read as lora_read
    from functional_sd3.weights import metadata

    students = {}
    sizes = config.transformer
    for spec in map(parse, texts):
        path = lora_read.find(spec.path)
        configs = metadata.read(files.read_header(path).metadata, str(path)) or {}
        if "schedule" in configs and spec.scale != 0:
            students[configs["schedule"]] = path
        if sizes is not None and "transformer" in configs:
            sizes = replace(sizes, interval_size=sizes.interval_size or configs["transformer"].interval_size)
    if len(students) > 1:
        raise ValueError(f"--lora: {' and '.join(map(str, students.values()))} are students of different steps")
    return replace(config, schedule=next(iter(students), config.schedule), transformer=sizes)


def with_interval(components: "Components", config: "Config") -> "Components":
    """The components of a model for LoRAs that bring an embedder of t - r, of zeros in the transformer."""
    from functional_sd3.pipeline.components import changed
    from functional_sd3.transformer import mmdit

    network = config.transformer
    if network is None or not network.interval_size:
        return components

    def extend(name: str, params: "Params") -> "Params":
        return mmdit.with_interval(params, network) if name == "transformer" else params

    return changed(components, extend)


def with_student(texts: Sequence[str], model: "Model") -> "Model":
    """The model with the config that the LoRAs of these options make, and what they adapt (`student_config`)."""
    from functional_sd3.transformer import mmdit

    config, params = student_config(texts, model.config), dict(model.params)
    if config.transformer is not None and "transformer" in params:
        params["transformer"] = mmdit.with_interval(params["transformer"], config.transformer)
    return model._replace(config=config, params=params)


def note_left_out(path: str | Path, keys: Sequence[str]) -> None:
    """Say on standard error which tensors of a LoRA adapt nothing of the model."""
    if keys:
        some = ", ".join(shorten(key) for key in keys[:3]) + (", ..." if len(keys) > 3 else "")
        text = f"{len(keys)} tensors adapt nothing of this model and are left out: {some}"
        report.note(f"{shorten(path, 300)}: {text}")
